"""A step of training the whole model: LLaVA's MLP on all patches, one global scope, three scopes; tower frozen.

    python -m research.benchmarks.training_step      stage 1 (align) and stage 2 (instruct), 144 visual tokens
    python -m research.benchmarks.training_step --stages align --records 2 --visual-tokens 36

CLIP-L/14-336 and Qwen2.5-0.5B's shapes, random weights, in float32 or on a GPU as training does it (what is frozen in
bfloat16, the rest under autocast), a batch of records of one image and 64 words; tower
and language model are the same in all, and so is the language model's optimiser. A step is forward, backward and AdamW.
Prints one markdown table for each stage, with gradient checkpointing and without: medians of interleaved repeats, the
spread, and the most that tensors took beside weights and moments.
"""

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config

from ms_resampler import MSResamplerConfig, MSResamplerForConditionalGeneration
from ms_resampler.folders import write_whole
from ms_resampler.training.memory import BatchShape
from ms_resampler.training.parameters import freeze, parameter_groups, set_precision
from ms_resampler.training.recipes import RECIPES, Recipe
from ms_resampler.training.step_time import backward, milliseconds, peak_memory, update

from ..timing import in_turn, machine, markdown_table, spread, times_as_long
from .model import DEVICE, DTYPE, QWEN, TOWER, WORDS, make_projector, shapes

PROJECTORS = ("mlp", "resampler", "ms_resampler")


def make_models(parts: dict, visual_tokens: int) -> dict[str, PreTrainedModel]:
    """A model for every projector, around one tower and one language model; the MLP keeps all patches."""
    torch.manual_seed(0)
    side = parts["vision_config"].image_size // parts["vision_config"].patch_size
    models: dict[str, Any] = {}
    for kind in PROJECTORS:
        projector = {"projector_type": kind, "visual_tokens": side**2 if kind == "mlp" else visual_tokens}
        config = MSResamplerConfig(**parts, projector_config=projector)
        if not models:
            with torch.device(DEVICE):
                models[kind] = first = MSResamplerForConditionalGeneration(config)
            continue
        with torch.device("meta"):
            models[kind] = model = MSResamplerForConditionalGeneration(config)
        model.model.projector = make_projector(config)
        model.model.vision_tower, model.model.language_model = first.model.vision_tower, first.model.language_model
        model.lm_head = first.lm_head
    return models


class SharedOptimiser:
    """AdamW for what a model trains of its own, and one, the same for all models, for what they share."""

    def __init__(self, model: Any, recipe: Recipe, shared: torch.optim.Optimizer | None):
        groups = parameter_groups(model, recipe.rates, recipe.weight_decay)
        ids = {id(parameter) for parameter in model.model.projector.parameters()}
        own = [group for group in groups if id(group["params"][0]) in ids]
        rest = [group for group in groups if id(group["params"][0]) not in ids]
        self.shared = shared or (torch.optim.AdamW(rest, fused=True) if rest else None)
        self.parts = [torch.optim.AdamW(own, fused=True), *([self.shared] if self.shared else [])]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()


def make_steps(models: dict[str, PreTrainedModel], recipe: Recipe, records: int) -> dict[str, partial]:
    """A step of every model, by name and visual tokens."""
    steps, shared = {}, None
    for kind, model in models.items():
        freeze(model, recipe.rates)
        set_precision(model, torch.bfloat16 if recipe.bf16 else torch.float32)
        optimiser = SharedOptimiser(model, recipe, shared)
        shared = optimiser.shared
        side = model.config.vision_config.image_size
        rows, columns = model.config.token_grid((side, side))
        shape = BatchShape(records, rows * columns + WORDS, side)
        steps[f"{kind}, {rows * columns}"] = partial(step, model.train(), optimiser, recipe, shape)
    return steps


def step(model: PreTrainedModel, optimiser: Any, recipe: Recipe, shape: BatchShape) -> None:
    backward(model, model.config, recipe, shape)
    update(model, optimiser, recipe)


def switch_checkpointing(model: PreTrainedModel, on: bool) -> None:
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


def measure(
    models: dict[str, PreTrainedModel], stage: str, records: int, repeats: int
) -> dict[bool, dict[str, dict[str, Any]]]:
    """Times and memory of every model's step, with gradient checkpointing (True) and without (False)."""
    recipe = replace(RECIPES[stage](), bf16=DTYPE == "bfloat16")
    steps = make_steps(models, recipe, records)
    for run in steps.values():
        run()  # the moments of Adam are there from now on
    measured = {}
    for checkpointing in (False, True):
        for model in models.values():
            switch_checkpointing(model, checkpointing)
        peaks = {name: peak_memory(run) for name, run in steps.items()}
        times = in_turn({name: partial(milliseconds, run) for name, run in steps.items()}, repeats)
        measured[checkpointing] = {name: {"ms": times[name], "peak_bytes": peaks[name]} for name in steps}
    return measured


def table(measured: dict[bool, dict[str, dict[str, Any]]], records: int) -> str:
    """The numbers in markdown."""
    head = ["projector, visual tokens", "checkpointing", "seconds a step", "spread", "records/s"]
    head += ["x resampler", "x mlp", "peak (MB)"]
    lines = []
    for checkpointing, rows in measured.items():
        times = {name.split(",")[0]: row["ms"] for name, row in rows.items()}
        for name, row in rows.items():
            median = statistics.median(row["ms"]) / 1000
            cells = [
                name,
                "yes" if checkpointing else "no",
                f"{median:.3g}",
                spread([ms / 1000 for ms in row["ms"]], 2 if median > 1 else 4),
                f"{records / median:.3g}",
                *(f"{times_as_long(row['ms'], times[base]):.2f}" for base in ("resampler", "mlp")),
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
            lines.append(cells)
    return markdown_table(head, lines)


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=("align", "instruct"), default=["align", "instruct"])
    parser.add_argument("--records", type=int, default=1, help="in a batch")
    parser.add_argument("--visual-tokens", type=int, default=144, help="of the resamplers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    asked = parser.parse_args()
    models = make_models(shapes(TOWER, Qwen2Config(**QWEN)), asked.visual_tokens)
    print(f"{machine()}; {DTYPE}, {asked.records} record(s) a step")
    kept: dict[str, Any] = {"machine": machine(), "records": asked.records, "stages": {}}
    for stage in asked.stages:
        measured = measure(models, stage, asked.records, asked.repeats)
        print(f"\n{stage}\n\n{table(measured, asked.records)}", flush=True)
        kept["stages"][stage] = {"checkpointing": measured[True], "plain": measured[False]}
        if asked.json:
            write_whole(asked.json, json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
