"""Plain questions without pictures: the language model's own answers, to stay as it was, and how many are right."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoProcessor

from ..folders import write_whole
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration

LENGTH = 48  # tokens of an answer


@torch.inference_mode()
def answers_of(folder: Path, questions: Sequence[str], path: Path) -> list[tuple[str, str]]:
    """Questions with a model's greedy answers, up to their last whole sentence; kept in `path`."""
    if path.is_file():
        return [tuple(pair) for pair in json.loads(path.read_text(encoding="utf-8"))]
    model = MSResamplerForConditionalGeneration.from_pretrained(folder, dtype="auto").eval().pack_weights()
    processor = AutoProcessor.from_pretrained(folder)
    pairs = []
    for begin in range(0, len(questions), 10):
        asked = list(questions[begin : begin + 10])
        texts = [
            processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
            for question in asked
        ]
        inputs = processor(text=texts, return_tensors="pt", padding=True)
        out = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
        said = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs += [(question, whole_sentences(answer.strip())) for question, answer in zip(asked, said, strict=True)]
    write_whole(path, json.dumps(pairs, indent=0, ensure_ascii=False))
    return pairs


def whole_sentences(answer: str) -> str:
    """An answer without a last sentence that has no end."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", answer)]
    return answer[: ends[-1]] if ends else answer


def right_answers(folder: Path, questions: Sequence[Sequence[str]], path: Path) -> dict[str, float]:
    """How many answers hold one of the expected words (alternatives are separated by "|"), of how many questions."""
    pairs = answers_of(folder, [question for question, _ in questions], path)
    right = [
        any(re.search(rf"\b{re.escape(word)}\b", said.lower()) for word in expected.split("|"))
        for (_, said), (_, expected) in zip(pairs, questions, strict=True)
    ]
    return {"right": sum(right), "of": len(right)}
