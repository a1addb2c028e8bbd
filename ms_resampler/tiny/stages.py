"""The run of `ms-resampler train tiny`: trains the embedded default, measures it beside a blind one."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from .. import TINY
from ..hub_upload.card import results_table, write_card
from ..hub_upload.staging import allowed_files
from ..training.recipes import Stage, tiny_blind, tiny_look, tiny_read
from .curriculum import Looking
from .evaluate import FamilyScore, evaluate_scenes
from .model import assemble_tiny
from .record import plot_curves, training_record
from .train import train


def run_tiny(arguments: argparse.Namespace) -> None:
    """Trains (going on where a killed run stopped), evaluates, and leaves `OUT/model`, ready to load."""
    look, read, blind = (stage_of(make, arguments) for make in (tiny_look, tiny_read, tiny_blind))
    out = arguments.out or Path("runs/tiny")
    target = out / "model"

    model, processor = assemble_tiny(arguments.seed or 0)
    train(look, Looking(model.model), processor, out / "look")
    train(read, model, processor, out / "read")
    model.save_pretrained(target)
    processor.save_pretrained(target)
    scores = evaluate_once(model, processor, out / "scores.json", arguments.scenes, blind=False)

    guesser, _ = assemble_tiny(arguments.seed or 0)
    train(blind, guesser, processor, out / "blind")
    blind_scores = evaluate_once(guesser, processor, out / "blind_scores.json", arguments.scenes, blind=True)

    record = training_record((look, read, blind), model, out, scores, blind_scores)
    (target / "training_record.json").write_text(json.dumps(record, indent=2) + "\n")
    plot_curves(out, target / "curves.png")
    write_card(target, "MS-Resampler tiny")
    print(results_table(record))
    if arguments.embed:
        embed(target)


def stage_of(make: Any, arguments: argparse.Namespace) -> Stage:
    """A stage of the recipe with the command line's seed, and no more steps than it allows."""
    stage = make()
    if arguments.steps is not None:
        stage = make(min(stage.steps, arguments.steps))
    return dataclasses.replace(stage, seed=arguments.seed or 0)


def evaluate_once(model: Any, processor: Any, path: Path, scenes: int, blind: bool) -> list[FamilyScore]:
    """Evaluates, or reads what a run before has written to `path`."""
    if not path.exists():
        print(f"Evaluating the {'blind ' if blind else ''}model on {scenes} held-out scenes:")
        rows = evaluate_scenes(model, processor, scenes=scenes, blind=blind)
        path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    return [FamilyScore(**row) for row in json.loads(path.read_text())]


def embed(folder: Path) -> None:
    """Replaces the checkpoint in this package; its code stays where it is, one folder up."""
    old = Path(TINY)
    fresh = old.with_name("tiny.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in allowed_files(folder):
        shutil.copyfile(file, fresh / file.name)
    shutil.rmtree(old, ignore_errors=True)
    fresh.rename(old)
