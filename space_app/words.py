"""The words of an answer: which visual tokens each attended to in the language model, and how likely it was."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pictures import Refusal

LIKELIEST = 3  # next tokens told for a word


@dataclass(frozen=True)
class Word:
    """A word, its attention to the visual tokens of all pictures, and its probability after the words before it.

    The attention is the mean over the word's tokens, and over the language model's layers and heads unless one is
    chosen; the rest, up to one, went to text. likeliest: what could have come where the word begins, and how likely.
    """

    text: str
    shares: np.ndarray
    probability: float
    likeliest: list[tuple[str, float]]


@torch.inference_mode()
def attended_words(
    model: Any,
    tokenizer: Any,
    prompt: torch.Tensor,
    features: Any,
    answer: str,
    layer: int | None = None,
    head: int | None = None,
) -> list[Word]:
    """The words of an answer to a prompt (1, L) whose pictures are encoded.

    A word's attention is that of the positions from which its tokens were predicted. The prompt is processed as for
    the answer; only the answer's rows of attention are computed.
    Raises Refusal if the model's layers, or the chosen one, keep no attention weights.
    """
    tokens = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    answer_ids = torch.tensor([tokens["input_ids"]], device=prompt.device)
    before = model(input_ids=prompt[:, :-1], mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
    # transformers renamed it in 5.24.
    cache = {name: before[name] for name in ("past_key_values", "cache") if name in before.keys()}  # noqa: SIM118
    with eager_attention(model.model.language_model):
        rows = torch.cat([prompt[:, -1:], answer_ids[:, :-1]], dim=1)
        again = model(input_ids=rows, output_attentions=True, **cache)
    layers = again.attentions or ()
    if layer is not None:  # those of mixed models are not all there, and have other numbers
        layers = layers[layer : layer + 1] if len(layers) == model.config.text_config.num_hidden_layers else ()
    length = prompt.shape[1] + answer_ids.shape[1] - 1
    layers = [one for one in layers if one is not None and one.shape[-1] == length]
    if not layers:
        which = "This language model" if layer is None else "This layer of the language model"
        raise Refusal(f"{which} keeps no attention weights, so its words cannot be played.")
    heads = slice(None) if head is None else slice(head, head + 1)
    shares = sum(one[0, heads].float().mean(dim=0) for one in layers) / len(layers)
    to_pictures = shares[:, : prompt.shape[1]][:, prompt[0] == model.config.image_token_id].cpu().numpy()
    logs = again.logits[0].float().log_softmax(dim=-1).cpu()
    chosen = logs.gather(-1, answer_ids[0].cpu()[:, None])[:, 0]
    return [
        Word(
            answer[start:end],
            to_pictures[numbers].mean(axis=0),
            float(chosen[numbers].sum().exp()),
            likeliest(tokenizer, logs[numbers[0]]),
        )
        for start, end, numbers in words_of(answer, tokens["offset_mapping"])
    ]


def likeliest(tokenizer: Any, logs: torch.Tensor) -> list[tuple[str, float]]:
    """The LIKELIEST next tokens with their probabilities, from those of all (V), as logarithms."""
    values, ids = logs.topk(LIKELIEST)
    return [
        (tokenizer.decode([token]).strip(), value)
        for token, value in zip(ids.tolist(), values.exp().tolist(), strict=True)
    ]


@torch.inference_mode()
def probability(model: Any, tokenizer: Any, prompt: torch.Tensor, features: Any, answer: str) -> float:
    """Of an answer to a prompt (1, L) whose pictures are encoded."""
    ids = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"].to(prompt.device)
    whole = torch.cat([prompt, ids[:, :-1]], dim=1)
    logits = model(input_ids=whole, mm_encoder_outputs={"image": features}, logits_to_keep=ids.shape[1]).logits
    return float(logits[0].float().log_softmax(dim=-1).gather(-1, ids[0][:, None]).sum().exp())


@contextmanager
def eager_attention(language_model: Any) -> Iterator[None]:
    """Switches off the fused kernels, which return no attention weights."""
    before = language_model.config._attn_implementation
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        language_model.set_attn_implementation(before)


def words_of(text: str, offsets: list[tuple[int, int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Start, end and token indices of each word, from the tokens' character ranges.

    A token belongs to each word that it overlaps: "a bc" in tokens "a", " b", "c" -> (0, 1, [0]), (2, 4, [1, 2])
    """
    for match in re.finditer(r"\S+", text):
        touching = [n for n, (start, end) in enumerate(offsets) if start < match.end() and end > match.start()]
        if touching:
            yield match.start(), match.end(), touching
