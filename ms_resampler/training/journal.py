"""A run's record.json: recipe, model, data, versions and results."""

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..folders import write_whole
from .order import Schedule
from .recipes import Recipe
from .records import StreamedRecords

PACKAGES = ("ms-resampler", "torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "liger-kernel")
SAMPLED = 1000  # records of a Hub data set that are hashed
STREAMED = 100  # the first ones of a stream
SHOWN = 20  # records skipped or cut that are named in record.json; skipped.jsonl and cut.jsonl name all


class Journal:
    """OUT/record.json, written at the start and the end of a run by the process with `writes`."""

    def __init__(self, out: Path, writes: bool, values: dict[str, Any]):
        self.out = out
        self.writes = writes
        self.values = values

    def note(self, **values: Any) -> None:
        """Adds values, and writes the file."""
        self.values |= values
        if self.writes:
            self.out.mkdir(parents=True, exist_ok=True)
            self.write(self.out / "record.json")

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        write_whole(path, json.dumps(self.values, indent=2) + "\n")

    def finish(self, trainer: Trainer) -> None:
        """Notes the end of the run: time, hardware, the last loss, and what was skipped or cut."""
        history = trainer.state.log_history
        self.note(
            steps=trainer.state.global_step,
            devices=trainer.args.world_size,
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            device_batch=trainer.args.per_device_train_batch_size,
            accumulation=trainer.args.gradient_accumulation_steps,
            last_loss=next((row["loss"] for row in reversed(history) if "loss" in row), None),
            last_session_seconds=next((row["train_runtime"] for row in reversed(history) if "train_runtime" in row), 0),
            skipped=read_noted(self.out / "skipped.jsonl"),
            cut=read_noted(self.out / "cut.jsonl"),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def left_out(self) -> list[str]:
        """Sentences on records that were skipped or cut."""
        skipped, cut = self.values["skipped"]["records"], self.values["cut"]["records"]
        sentences = [
            (skipped, f"Bad records skipped: {skipped:,} ({self.out}/skipped.jsonl says why)."),
            (cut, f"Records cut to the recipe's length: {cut:,} (named in {self.out}/cut.jsonl)."),
        ]
        return [sentence for count, sentence in sentences if count]


def open_journal(
    recipe: Recipe, *, model: str, data: str, split: str, schedule: Schedule, out: Path, writes: bool
) -> Journal:
    """The journal of this run, new or as an interrupted run left it.

    Raises ValueError if that run had another recipe, model or data, so that its checkpoints do not fit.
    """
    values = {
        "recipe": dataclasses.asdict(recipe),
        "model": model,
        "data": {"source": data, "split": split, **schedule.extent(), "sha256": data_hash(data, schedule.records)},
        "versions": {"python": platform.python_version(), **installed(PACKAGES)},
    }
    journal = Journal(out, writes, json.loads(json.dumps(values)))
    if (out / "record.json").exists():
        before = json.loads((out / "record.json").read_text())
        if changed := sorted(differences(before, journal.values)):
            raise ValueError(
                f"{out} holds a run that was started with another {', '.join(changed)}: give a new --out, or start it "
                "as before."
            )
        journal.values = before | {"versions": journal.values["versions"]}
    return journal


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Which of recipe, model and data differ; for a stream also the numbers of devices and workers."""
    pairs = [(name, before["recipe"].get(name), value) for name, value in now["recipe"].items()]
    pairs += [("model", before["model"], now["model"]), ("data", before["data"]["sha256"], now["data"]["sha256"])]
    shares = {"split": "split", "parts": "number of devices or workers", "device_batch": "device batch size"}
    pairs += [(words, before["data"].get(name), now["data"].get(name)) for name, words in shares.items()]
    return [name for name, old, new in pairs if old != new]


def data_hash(source: str, records: Any) -> str:
    """SHA-256 of a file, of the names and contents of a folder's files, or of some records of a Hub data set."""
    path, digest = Path(source), hashlib.sha256()
    if not path.exists():
        for record in sample(records):
            said = record.get("conversations") or record.get("messages")
            digest.update(json.dumps(said, default=str).encode())
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            digest.update(file.relative_to(path.parent).as_posix().encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def sample(records: Any) -> Iterable[dict[str, Any]]:
    """Evenly spaced records, or the first ones of a stream."""
    if isinstance(records, StreamedRecords):
        return islice(records, STREAMED)
    return (records[index] for index in range(0, len(records), max(1, len(records) // SAMPLED)))


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def read_noted(path: Path) -> dict[str, Any]:
    """The number of records skipped or cut, and the first of them with the reason; a record counts once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    reasons = {row["id"]: row["why"] for row in rows}
    return {"records": len(reasons), "first": dict(list(reasons.items())[:SHOWN])}
