"""What visual token reducers cost and save: LLaVA-1.5's tower and MLP before a language model of Qwen2.5-0.5B's shapes.

    python -m research.benchmarks.reducers
    python -m research.benchmarks.reducers --budgets 192 128 64 36 --images 1 8 --repeats 5

Weights are random: times do not depend on them, but how many tokens mustdrop's thresholds leave does. Prints a
markdown table for each number of images: milliseconds to the first token, tower included, and tokens a second from
there on, medians of interleaved repeats, relative to the same model with all 576 tokens an image in the same rounds;
the cache's size behind the prompt; and the share of the multiply-accumulates of tower and language model that is saved,
counted from the rows that each layer was given, beside the share of the time.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from ms_resampler import MSResamplerConfig, MSResamplerForConditionalGeneration
from ms_resampler.reducers_ms_resampler import MUSTDROP, REDUCERS

from ..timing import count_macs, in_turn, machine, markdown_table, spread, times_as_long
from .model import DEVICE, LANGUAGE_MODELS, TOWER, WORDS, TokenClock, make_prompt, shapes, token_times

PATCHES = 576


def make_model() -> MSResamplerForConditionalGeneration:
    """LLaVA-1.5's shapes around a small language model."""
    torch.manual_seed(0)
    kind, sizes = LANGUAGE_MODELS["0.5b"]
    projector = {"projector_type": "mlp", "visual_tokens": [24, 24]}
    with torch.device(DEVICE):
        config = MSResamplerConfig(**shapes(TOWER, kind(**sizes)), projector_config=projector)
        return MSResamplerForConditionalGeneration(config).eval()


def contenders(budgets: list[int]) -> dict[str, dict[str, Any] | None]:
    """By name, the settings of a reducer; None is none."""
    found: dict[str, dict[str, Any] | None] = {f"all {PATCHES}": None}
    for name in REDUCERS:
        for budget in budgets:
            if name != "mustdrop" or budget in MUSTDROP:
                found[f"{name}, {budget}"] = {"reducer_type": name, "keep": budget}
    return found


def make_run(model: Any, reducer: dict[str, Any] | None, prompt: dict, new_tokens: int) -> Callable[..., Tensor]:
    """A run of generate() with a reducer."""
    exact = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run(clock: TokenClock | None = None) -> Tensor:
        model.set_reducer(**(reducer or {"reducer_type": None}))
        return model.generate(**prompt, **exact, stopping_criteria=StoppingCriteriaList([clock] if clock else []))

    return run


@torch.no_grad()
def cache_and_rows(model: Any, reducer: dict[str, Any] | None, prompt: dict) -> tuple[int, list[int]]:
    """The bytes of the cache behind the prompt, and how many tokens each layer was given."""
    model.set_reducer(**(reducer or {"reducer_type": None}))
    rows: list[int] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
        for layer in model.model.language_model.layers
    ]
    cache = DynamicCache()
    model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), rows


def macs(model: Any, rows: list[int], tower: int) -> int:
    """Multiply-accumulates of tower and layers for rows of these lengths."""
    layer = model.model.language_model.layers[0]
    weights = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    width = model.config.text_config.hidden_size
    return tower + sum(count * weights + 2 * count * count * width for count in rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[192, 64])
    parser.add_argument("--images", type=int, nargs="+", default=[1])
    parser.add_argument("--new-tokens", type=int, default=8, help="timed after the first token")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    model, names = make_model(), contenders(asked.budgets)
    print(f"{machine()}; float32, {WORDS} words of prompt", flush=True)
    for images in asked.images:
        prompt = make_prompt(model, images, PATCHES)
        tower = images * count_tower(model)
        kept = {name: cache_and_rows(model, reducer, prompt) for name, reducer in names.items()}
        runs = {name: make_run(model, reducer, prompt, 1 + asked.new_tokens) for name, reducer in names.items()}
        times = in_turn({name: partial(token_times, run) for name, run in runs.items()}, asked.repeats)
        first = {name: [answer[0] for answer in answers] for name, answers in times.items()}
        further = {name: [answer[-1] - answer[0] for answer in answers] for name, answers in times.items()}
        base = f"all {PATCHES}"
        whole = macs(model, kept[base][1], tower)
        rows = [
            [
                name,
                f"{statistics.median(first[name]):.0f}",
                spread(first[name], 0),
                f"{times_as_long(first[name], first[base]):.2f}",
                f"{macs(model, kept[name][1], tower) / whole:.2f}",
                f"{times_as_long(further[name], further[base]):.2f}",
                f"{kept[name][0] / 1e6:.1f}",
            ]
            for name in names
        ]
        head = ["reducer, tokens", "first token, ms", "spread", "x all", "operations x all", "later token x all"]
        print(f"\nImages: {images}\n\n{markdown_table([*head, 'cache (MB)'], rows)}", flush=True)


def count_tower(model: Any) -> int:
    """Multiply-accumulates of tower and projector for an image."""
    with torch.device("meta"):
        blank = MSResamplerForConditionalGeneration(model.config).eval()
        blank.set_reducer(None)
        side = model.config.vision_config.image_size
        pixels = torch.empty(1, 3, side, side)
    return count_macs(lambda: blank.get_image_features(pixels, return_dict=True))


if __name__ == "__main__":
    main()
