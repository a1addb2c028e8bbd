"""What a training run leaves behind: a record of how it was made, and its curves."""

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..training.recipes import Stage
from .evaluate import FamilyScore
from .scenes import COLOURS, SHAPES, WORDS
from .train import data_hash


def training_record(
    stages: Sequence[Stage],
    model: Any,
    folder: Path,
    scores: list[FamilyScore],
    blind_scores: list[FamilyScore],
) -> dict[str, Any]:
    """Stages, data, versions, time, results and the words of the scenes, as plain JSON values."""
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
        "vocabulary": {"shapes": list(SHAPES), "words": list(WORDS), "colours": list(COLOURS)},
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
