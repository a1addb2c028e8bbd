"""What a training run leaves behind: a record of how it was made, its curves, and the model's card."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..evaluation.scenes import FamilyScore
from .recipes import Stage
from .scenes import COLOURS, SHAPES, WORDS
from .train import data_hash

CLEARLY = 25  # points above the blind model that count as having learned a family
PAPER = "https://arxiv.org/abs/2606.31383"


def training_record(
    stages: Sequence[Stage],
    model: Any,
    folder: Path,
    scores: list[FamilyScore],
    blind_scores: list[FamilyScore],
) -> dict[str, Any]:
    """Stages, data, versions, time and results, as plain JSON values."""
    return {
        "stages": [describe_stage(stage, folder / stage.name) for stage in stages],
        "parameters": {name: count(part) for name, part in model.model.named_children()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "scores": [dataclasses.asdict(row) for row in scores],
        "blind_scores": [dataclasses.asdict(row) for row in blind_scores],
    }


def describe_stage(stage: Stage, folder: Path) -> dict[str, Any]:
    """The stage's numbers, a fingerprint of its data, and the seconds of its longest uninterrupted stretch."""
    numbers = {name: value for name, value in vars(stage).items() if not callable(value)}
    seconds = [row["train_runtime"] for row in read_log(folder) if "train_runtime" in row]
    return {
        **numbers,
        "data_sha256": data_hash(stage.dataset(stage.steps * stage.batch_size)),
        "seconds": max(seconds, default=None),
    }


def count(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl; a step whose loss was logged again after a resume counts once, the last time."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row for row in rows if "loss" in row}
    return [*losses.values(), *(row for row in rows if "loss" not in row)]


def plot_curves(folder: Path, path: Path) -> None:
    """The loss of every stage against its steps, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, colour in (("look", "#E69F00"), ("read", "#0072B2"), ("blind", "#999999")):
        rows = [row for row in read_log(folder / name) if "loss" in row]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=colour, label=name)
    axes.set(xlabel="optimiser step", ylabel="loss (nats)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def families_by_gain(record: dict[str, Any], clear: bool) -> str:
    """The families on which the model is clearly better than the blind one, or those on which it is not."""
    gains = {
        row["family"]: 100 * (row["mean"] - blind["mean"])
        for row, blind in zip(record["scores"], record["blind_scores"], strict=True)
    }
    return ", ".join(family for family, gain in gains.items() if (gain >= CLEARLY) == clear) or "none"


def weakest_families(record: dict[str, Any], number: int = 3) -> str:
    """The families with the lowest scores, the lowest first: "compare (58%), ..."."""
    rows = sorted(record["scores"], key=lambda row: row["mean"])[:number]
    return ", ".join(f"{row['family']} ({row['mean']:.0%})" for row in rows)


def write_card(record: dict[str, Any], table: str, path: Path) -> None:
    """The model card of the embedded checkpoint, its numbers taken from the record."""
    parameters = sum(record["parameters"].values())
    look, read, blind = record["stages"]
    path.write_text(f"""---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
language: en
tags: [custom_code, ms_resampler]
---

# MS-Resampler tiny

A {parameters / 1e6:.1f}-million-parameter vision-language model, trained from random weights on pictures that its own
generator draws. It exists to show the multi-scope resampler at work: three resamplers (local, regional, global) read
the same {12 * 12} patches, each within its own spatial scope, and are fused into 36 visual tokens.

The idea is that of the MS-Resampler paper ({PAPER}). Only its abstract is public: the equations here are this
project's reading of it, and no number on this page is the paper's.

## What it can do

Answer short English questions about 96 x 96 pixel scenes of one to six things: handwritten digits, shapes
({", ".join(SHAPES)}) and words ({", ".join(WORDS)}) in six colours ({", ".join(COLOURS)}) on plain papers. At least
{CLEARLY} points better than its blind twin: {families_by_gain(record, clear=True)}.

## What it cannot do

Families less than {CLEARLY} points better than its blind twin: {families_by_gain(record, clear=False)}. Its weakest:
{weakest_families(record)}.

Anything else: it has never seen a photograph; shown one, it will describe digits and shapes that are not there.
It knows a few hundred words, has no common sense, and takes questions worded as in training.

## Accuracy

On held-out scenes with handwritten digits that were not in training; every question asked on its own. "Blind" is
the same language model trained on the same questions without images. Describing is scored by the F1 of its items,
everything else by exact match; intervals are 95% bootstrap intervals over questions.

{table}

## How it was made

`ms-resampler train tiny`, seed {read["seed"]}. First tower and projector look: for {look["steps"]:,} steps of
{look["batch_size"]} scenes every visual token is asked, through linear heads that are thrown away, what is at its
place. Then the whole model reads: {read["steps"]:,} steps of {read["batch_size"]} scenes, at first transcribed place by
place or indexed name by name, later with ten questions each. The blind model trained for {blind["steps"]:,} steps.
`training_record.json` holds the rest.
The digits are those of scikit-learn (UCI, "Optical Recognition of Handwritten Digits"), shared out by image.

![loss curves](curves.png)
""")
