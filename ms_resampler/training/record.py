"""The record of a recipe's run: what was trained on what, by which versions, and how it went."""

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
from .options import RunOptions
from .order import Schedule
from .recipes import Recipe
from .records import StreamedRecords

PACKAGES = ("ms-resampler", "torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "liger-kernel")
SAMPLED = 1000  # records of a Hub data set that make up its hash
STREAMED = 100  # of a stream, the first ones
SHOWN = 20  # records skipped or cut that are named in the record; skipped.jsonl and cut.jsonl have all


class RunRecord:
    """RUN/record.json; written by one process, at the start and at the end."""

    def __init__(self, path: Path, writes: bool, values: dict[str, Any]):
        self.path = path
        self.writes = writes
        self.values = values

    def note(self, **values: Any) -> None:
        """Adds values, and writes the record."""
        self.values |= values
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write(self.path)

    def write(self, path: Path) -> None:
        """Writes the record whole or not at all."""
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
            skipped=read_noted(self.path.with_name("skipped.jsonl")),
            cut=read_noted(self.path.with_name("cut.jsonl")),
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def losses(self) -> list[str]:
        """Sentences on records that were left out, or of which something was."""
        values, folder = self.values, self.path.parent
        sentences = [
            (values["skipped"]["records"], f"skipped, for they cannot be learned from ({folder}/skipped.jsonl)"),
            (values["cut"]["records"], f"cut, for they are longer than the recipe takes ({folder}/cut.jsonl)"),
        ]
        return [f"Records {what}: {count:,}." for count, what in sentences if count]


def open_record(recipe: Recipe, options: RunOptions, schedule: Schedule) -> RunRecord:
    """The record of this run, new or as a stopped run left it.

    Raises ValueError if that one had another recipe, model or data: its checkpoints are not this run's.
    """
    values = {
        "recipe": dataclasses.asdict(recipe),
        "model": options.model,
        "data": {
            "source": str(options.data),
            "split": options.split,
            **schedule.extent(),
            "sha256": data_hash(options.data, schedule.records),
        },
        "versions": {"python": platform.python_version(), **installed(PACKAGES)},
    }
    record = RunRecord(options.out / "record.json", options.writes, json.loads(json.dumps(values)))
    if record.path.exists():
        before = json.loads(record.path.read_text())
        if changed := sorted(differences(before, record.values)):
            raise ValueError(
                f"{options.out} holds a run that was started with another {', '.join(changed)}: give a new --out, or "
                "start it as before."
            )
        record.values = before | {"versions": record.values["versions"]}
    return record


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of recipe, model and data is not the same; of a stream, how it is shared out, too."""
    pairs = [(name, before["recipe"].get(name), value) for name, value in now["recipe"].items()]
    pairs += [("model", before["model"], now["model"]), ("data", before["data"]["sha256"], now["data"]["sha256"])]
    shares = {"split": "split", "parts": "number of devices or workers", "device_batch": "device batch size"}
    pairs += [(words, before["data"].get(name), now["data"].get(name)) for name, words in shares.items()]
    return [name for name, old, new in pairs if old != new]


def data_hash(source: str, records: Any) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files; of a Hub data set, of some records."""
    path, digest = Path(source), hashlib.sha256()
    if not path.exists():
        for record in sample(records):
            digest.update(json.dumps(record["conversations"]).encode())
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            digest.update(file.relative_to(path.parent).as_posix().encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def sample(records: Any) -> Iterable[dict[str, Any]]:
    """Records from all over the data, or the first ones of a stream."""
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
    """How many records were skipped or cut, and the first of them with the reason; a record counts once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    reasons = {row["id"]: row["why"] for row in rows}
    return {"records": len(reasons), "first": dict(list(reasons.items())[:SHOWN])}
