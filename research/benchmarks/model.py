"""The whole model against LLaVA, the same tower and language model in both: CLIP-L/14-336 and Qwen2.5-0.5B's shapes.

    python -m research.benchmarks.model      one image, budgets of 576, 144, 64 and 36 visual tokens
    python -m research.benchmarks.model --images 2 4 8 --budgets 144 36 --repeats 3 --new-tokens 0 --requests 0
    python -m research.benchmarks.model --llm 7b --budgets 144 36 --repeats 3 --new-tokens 0 --requests 0
    python -m research.benchmarks.model --packed --budgets 144 36      on a CPU
    python -m research.benchmarks.model --graphs --budgets 144 36      on a GPU
    python -m research.benchmarks.model --compile --budgets 144 36      and compiled there

Weights are random: times do not depend on them. On a GPU, if there is one, in bfloat16, elsewhere in float32. `--llm
7b` has the shapes of Vicuna-7B; without a GPU one layer's weights (0.8 GB in float32, far larger than any
processor cache) serve all 32 layers, each with its own keys and values: the same operations in 4 GB instead of 28.
`--graphs` runs prompt and tokens as CUDA graphs over a static cache, and not through generate(); `--compile` does the
same with both compiled before (on a CPU: compiled alone). `--packed` measures both models a second time with packed
weights (`pack_weights`), on a CPU.

Prints markdown tables: milliseconds to the first token (image included), tokens a second from there on, and requests a
second of a batch, medians of interleaved repeats and their spread, relative to transformers'
LlavaForConditionalGeneration with its 576 tokens an image (and to a packed one) in the same rounds; the most that
tensors took beside the weights; and the floor: the multiply-accumulates of prompt and images (attention counted whole,
the head at the last place) over the rate of a product of large square matrices, or reading the weights once at the rate
of a copy, whichever is longer.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ms_resampler import MSResamplerConfig, MSResamplerForConditionalGeneration
from ms_resampler.folders import write_whole
from ms_resampler.packing_ms_resampler import PackedLinear, pack_linears
from ms_resampler.projectors_ms_resampler import build_projector, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights
from ms_resampler.towers_ms_resampler import make_layers_skippable
from ms_resampler.training.step_time import peak_memory, wait_for_device

from ..timing import count_macs, in_turn, interleaved, machine, markdown_table, rates, spread, times_as_long

DEVICE, DTYPE = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("past_key_values", "cache"))
WORDS = 64  # tokens of text in the prompt
TOWER = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
VICUNA = {"vocab_size": 32000, "max_position_embeddings": 8192}  # the rest are Llama's defaults
LANGUAGE_MODELS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "0.5b": (Qwen2Config, QWEN),
    "7b": (LlamaConfig, VICUNA),
}


def shapes(tower: dict, language_model: PreTrainedConfig) -> dict[str, Any]:
    """The shared configurations of both models."""
    parts = {"vision_config": CLIPVisionConfig(**tower), "text_config": language_model}
    return parts | {"image_token_id": language_model.vocab_size - 1}


def make_models(
    parts: dict, dtype: torch.dtype = torch.float32, one_layer: bool = False, packed: bool = False
) -> tuple[LlavaForConditionalGeneration, MSResamplerForConditionalGeneration]:
    """LLaVA and ours, around one tower and one language model, whose layers may share one layer's weights."""
    torch.manual_seed(0)
    text = parts["text_config"]
    first = type(text)(**text.to_dict() | {"num_hidden_layers": 1}) if one_layer else text
    with torch.device(DEVICE):
        llava = LlavaForConditionalGeneration(LlavaConfig(**parts | {"text_config": first})).to(dtype).eval()
    if packed:
        pack_linears(llava)
    if one_layer:
        repeat_layer(llava.model.language_model, text)
    config = MSResamplerConfig(**parts)
    with torch.device("meta"):
        ours = MSResamplerForConditionalGeneration(config).to(dtype).eval()
    ours.model.projector = make_projector(config).to(dtype).eval()
    ours.model.vision_tower = llava.model.vision_tower
    make_layers_skippable(ours.model.vision_tower, config.unread_layers)
    ours.model.language_model, ours.lm_head = llava.model.language_model, llava.lm_head
    return llava, ours.pack_weights() if packed else ours


def make_projector(config: MSResamplerConfig) -> nn.Module:
    """The configuration's initialised projector, with weights, unlike a model on the meta device."""
    with torch.device(DEVICE):
        return build_projector(config).apply(init_resampler_weights).apply(init_projector_weights)


def repeat_layer(language_model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Makes all layers share the first one's weights."""
    with torch.device("meta"):
        layers = type(language_model)(config).layers
    for name, part in language_model.layers[0].named_modules():
        if list(part.parameters(recurse=False)):
            for layer in layers:
                layer.set_submodule(name, part)
    language_model.layers = layers.eval()
    language_model.config.num_hidden_layers = config.num_hidden_layers


def make_prompt(model: PreTrainedModel, images: int, visual_tokens: int, requests: int = 1) -> dict[str, Any]:
    """Requests with images, their placeholders, and words after them."""
    side = model.config.vision_config.image_size
    placeholders = torch.full((requests, images * visual_tokens), model.config.image_token_id)
    ids = torch.cat([placeholders, torch.randint(10, 1000, (requests, WORDS))], dim=1).to(DEVICE)
    pixels = torch.randn(requests * images, 3, side, side, dtype=model.dtype, device=DEVICE)
    prompt: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if isinstance(model, MSResamplerForConditionalGeneration):
        grid = round(visual_tokens**0.5)
        prompt["token_grids"] = [(grid, grid)] * (requests * images)  # a list, which torch.compile wants
    return prompt


def contenders(
    llava: PreTrainedModel, ours: PreTrainedModel, budgets: list[int], suffix: str = ""
) -> dict[str, tuple[PreTrainedModel, int]]:
    """By name, a model and its visual tokens an image."""
    vision = ours.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    names = {f"LLaVA, {patches}": (llava, patches)} | {f"ours, {budget}": (ours, budget) for budget in budgets}
    return {name + suffix: model for name, model in names.items()}


def make_run(
    model: PreTrainedModel, visual_tokens: int, images: int, new_tokens: int, requests: int = 1
) -> Callable[..., Tensor]:
    """A run of generate() that answers every request with a number of tokens, and reports the time of each."""
    prompt = make_prompt(model, images, visual_tokens, requests)
    exact = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run(clock: "TokenClock | None" = None) -> Tensor:
        return model.generate(**prompt, **exact, stopping_criteria=StoppingCriteriaList([clock] if clock else []))

    return run


def make_recorded_run(
    model: PreTrainedModel,
    visual_tokens: int,
    images: int,
    new_tokens: int,
    requests: int = 1,
    *,
    compiled: bool = False,
) -> Callable[..., Tensor]:
    """The same as two CUDA graphs over a static cache, of the prompt and of a token after it; without generate().

    `compiled` compiles both with torch.compile first, as one graph each.
    """
    prompt = make_prompt(model, images, visual_tokens, requests)
    del prompt["attention_mask"]  # of ones
    length = prompt["input_ids"].shape[1]
    cache = StaticCache(config=model.config.text_config, max_cache_len=length + new_tokens)
    token = {"input_ids": torch.zeros(requests, 1, dtype=torch.long, device=DEVICE)}
    places = [torch.arange(length, device=DEVICE)[None], torch.tensor([[length]], device=DEVICE)]
    read, go_on = (
        record(partial(likeliest, model, **inputs, position_ids=place, **{CACHE: cache}), cache, compiled)
        for inputs, place in zip((prompt, token), places, strict=True)
    )

    @torch.no_grad()
    def run(clock: TokenClock | None = None) -> Tensor:
        answer = [prompt["input_ids"]]
        for number in range(new_tokens):
            if number:
                token["input_ids"].copy_(answer[-1])
                places[1].fill_(length + number - 1)
            answer.append((go_on if number else read)().clone())
            if clock:
                clock(answer[-1], answer[-1])
        cache.reset()
        return torch.cat(answer, dim=1)

    return run


def likeliest(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The most likely next token of every text: (requests, 1)."""
    return model(**inputs, logits_to_keep=1).logits.argmax(-1)


@torch.no_grad()
def record(step: Callable[[], Tensor], cache: StaticCache, compiled: bool) -> Callable[[], Tensor]:
    """A step on tensors at fixed addresses, as a CUDA graph; without a GPU the step itself."""
    step()  # makes the cache's tensors, and transformers' hooks, which are not compiled
    cache.reset()
    if compiled:
        step = torch.compile(step, dynamic=False, fullgraph=True)
    with uncounted_placeholders():
        for _ in range(3):  # libraries start up
            step()
            cache.reset()
    if DEVICE == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with uncounted_placeholders(), torch.cuda.graph(graph):
        answer = step()

    def replay() -> Tensor:
        graph.replay()
        return answer

    return replay


@contextmanager
def uncounted_placeholders() -> Iterator[None]:
    """In this context neither model counts its placeholders, which would wait for the device.

    LLaVA counts them even with transformers' checks switched off, for its error message.
    """

    def where(llava: LlavaModel, input_ids: Tensor, **_: Tensor) -> Tensor:
        return (input_ids == llava.config.image_token_id).unsqueeze(-1)

    unchecked = patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    with unchecked, patch.object(LlavaModel, "get_placeholder_mask", where):
        yield


def prompt_macs(model: PreTrainedModel, visual_tokens: int, images: int) -> int:
    """Multiply-accumulates up to the first token, counted on tensors without data."""
    with torch.device("meta"):
        blank = type(model)(model.config).to(model.dtype).eval().requires_grad_(False)
        side = model.config.vision_config.image_size
        pixels = torch.empty(images, 3, side, side, dtype=model.dtype)
        text = torch.empty(1, images * visual_tokens + WORDS, model.config.text_config.hidden_size, dtype=model.dtype)
    grid, options = round(visual_tokens**0.5), {}
    if isinstance(model, MSResamplerForConditionalGeneration):
        options["token_grids"] = [(grid, grid)] * images
    head = count_macs(lambda: blank.lm_head(text[:, -1:]))
    # With a cache, because without one transformers looks at positions for several texts in one row.
    language_model = count_macs(lambda: blank.model.language_model(inputs_embeds=text, use_cache=True))
    return head + language_model + count_macs(lambda: blank.get_image_features(pixels, **options, return_dict=True))


def weight_bytes(model: PreTrainedModel) -> int:
    """The bytes to read for a prompt: all weights but the embeddings, of which only a few rows are read."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(weight.nbytes for weight in model.parameters()) - (0 if table is head else table.nbytes)


def measure_prompts(
    names: dict,
    images: int,
    new_tokens: int,
    repeats: int,
    speed: tuple[float, float],
    make: Callable = make_run,
) -> dict[str, dict[str, Any]]:
    """Every contender's times to the first token and for `new_tokens` more, with memory and floor."""
    runs = {name: make(*model, images, 1 + new_tokens) for name, model in names.items()}
    peaks = {name: peak_memory(run) for name, run in runs.items()}  # warms up, too
    times = in_turn({name: partial(token_times, run) for name, run in runs.items()}, repeats)
    macs = {name: prompt_macs(model, tokens, images) for name, (model, tokens) in names.items()}
    mac_rate, byte_rate = speed
    return {
        name: {
            "first_ms": [first for first, *_ in answers],
            "further_ms": [last - first for first, *_, last in answers] if new_tokens else [],
            "peak_bytes": peaks[name],
            "macs": macs[name],
            "floor_ms": 1000 * max(macs[name] / mac_rate, weight_bytes(names[name][0]) / byte_rate),
        }
        for name, answers in times.items()
    }


class TokenClock(StoppingCriteria):
    """Records the time of each token, and never stops."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        wait_for_device()
        self.seconds.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def token_times(run: Callable[..., Tensor]) -> list[float]:
    """Milliseconds from the start of a run to each token of its answer."""
    clock = TokenClock()
    wait_for_device()
    start = time.perf_counter()
    run(clock)
    return [1000 * (second - start) for second in clock.seconds]


def prompt_table(records: dict[str, dict[str, Any]], new_tokens: int) -> str:
    """The times to the first token and after it, in markdown."""
    bases = bases_of(records)
    llava, *_ = bases.values()
    head = ["model, visual tokens", "first token, ms", "spread", *(f"x {name}" for name in bases), "GMAC", "x LLaVA's"]
    head += ["share of the floor", "tokens/s after it", "peak (MB)"]
    rows = []
    for name, record in records.items():
        first, macs = record["first_ms"], record["macs"]
        median = statistics.median(first)
        digits = 0 if median > 100 else 1
        cells = [name, f"{median:.{digits}f}", spread(first, digits)]
        cells += [f"{times_as_long(first, base['first_ms']):.2f}" for base in bases.values()]
        cells += [f"{macs / 1e9:.0f}", f"{macs / llava['macs']:.2f}", f"{record['floor_ms'] / median:.0%}"]
        cells += [f"{1000 * new_tokens / statistics.median(record['further_ms']):.1f}" if new_tokens else ""]
        rows.append([*cells, f"{record['peak_bytes'] / 1e6:.0f}"])
    return markdown_table(head, rows)


def batch_table(times: dict[str, list[float]], requests: int) -> str:
    """Requests a second of a batch, in markdown."""
    bases = bases_of(times)
    rows = [
        [
            name,
            f"{1000 * requests / statistics.median(spent):.3g}",
            spread([ms / 1000 for ms in spent], 1 if min(spent) > 1000 else 3),
            *(f"{times_as_long(base, spent):.2f}" for base in bases.values()),
        ]
        for name, spent in times.items()
    ]
    head = ["model, visual tokens", "requests/s", "seconds a batch", *(f"requests/s x {name}" for name in bases)]
    return markdown_table(head, rows)


def bases_of(measured: dict[str, Any]) -> dict[str, Any]:
    """The references of a table: LLaVA, and the packed LLaVA if it was measured."""
    return {name: what for name, what in measured.items() if name.startswith("LLaVA")}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", choices=LANGUAGE_MODELS, default="0.5b", help="whose shapes the language model has")
    parser.add_argument("--images", type=int, nargs="+", default=[1])
    parser.add_argument("--budgets", type=int, nargs="+", default=[576, 144, 64, 36])
    parser.add_argument("--new-tokens", type=int, default=16, help="timed after the first token (0: none)")
    parser.add_argument("--requests", type=int, default=4, help="in the batch, with one image each (0: no batch)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=DTYPE)
    parser.add_argument("--packed", action="store_true", help="measure packed weights, too")
    parser.add_argument("--graphs", action="store_true", help="run as CUDA graphs, and not through generate()")
    parser.add_argument("--compile", action="store_true", help="the same, compiled before")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    asked = parser.parse_args()
    if asked.packed and asked.compile:
        parser.error("--packed: packed weights are not compiled, so leave out --compile.")
    return asked


def main() -> None:
    """Measures, prints and keeps."""
    asked = arguments()
    torch._dynamo.config.recompile_limit = 256  # a graph for every budget, number of images and of requests
    kind, sizes = LANGUAGE_MODELS[asked.llm]
    dtype, one_layer = getattr(torch, asked.dtype), asked.llm == "7b" and DEVICE == "cpu"
    parts, speed = shapes(TOWER, kind(**sizes)), rates(dtype)
    names = contenders(*make_models(parts, dtype, one_layer), asked.budgets)
    if asked.packed:
        packed = make_models(parts, dtype, one_layer, packed=True)
        if not isinstance(packed[1].lm_head, PackedLinear):
            raise SystemExit(f"--packed: there are no packed weights for {asked.dtype} on this {DEVICE}.")
        names |= contenders(*packed, asked.budgets, ", packed")
    how = f"{asked.dtype}, language model {asked.llm}" + (", one layer's weights in all layers" if one_layer else "")
    recorded = asked.graphs or asked.compile
    how += f", {'CUDA graphs' if DEVICE == 'cuda' else 'a static cache'}" if recorded else ""
    how += ", compiled" if asked.compile else ""
    print(f"{machine()}; {how}, {WORDS} words of prompt", flush=True)
    kept: dict[str, Any] = {"machine": machine(), "how": how, "rates": speed, "images": {}}
    make = partial(make_recorded_run, compiled=asked.compile) if recorded else make_run
    for images in asked.images:
        records = measure_prompts(names, images, asked.new_tokens, asked.repeats, speed, make)
        print(f"\nImages: {images}\n\n{prompt_table(records, asked.new_tokens)}", flush=True)
        kept["images"][images] = records
    if asked.requests:
        runs = {name: make(*model, 1, 1 + asked.new_tokens, asked.requests) for name, model in names.items()}
        kept["batch"] = interleaved(runs, min(asked.repeats, 5))
        about = f"{asked.requests} requests at once, an image and {1 + asked.new_tokens} tokens of answer each"
        print(f"\n{about}\n\n{batch_table(kept['batch'], asked.requests)}", flush=True)
    if asked.json:
        write_whole(asked.json, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
