"""Asks a task's questions: batches of similar length, every picture encoded once, answers stored immediately."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answering import Answerer
from .samples import Picture, Problem, Sample

WINDOW = 8  # batches whose pictures are encoded together, and whose prompts are sorted by length


@dataclass(frozen=True)
class Reply:
    """The result of asking a sample: a text, or a problem."""

    text: str | None
    problem: Problem | None = None
    seconds: float = 0.0
    visual_tokens: int | None = None


def prompt_hash(prompt: str) -> str:
    """Identifies the prompt that a stored answer belongs to."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def plan(samples: Sequence[Sample], prompts: Sequence[str], batch_size: int) -> list[list[list[int]]]:
    """Windows of batches of sample indices.

    Questions about one picture are in one window or in two adjacent ones; in a window, batches have prompts of similar
    length, the longest first. The plan does not depend on the number of processes, which take windows in turn.
    """
    first: dict[str, int] = {}
    for place, sample in enumerate(samples):
        first.setdefault(sample.unit, place)
    order = sorted(range(len(samples)), key=lambda place: first[samples[place].unit])
    size = batch_size * max(1, min(WINDOW, len(samples) // batch_size // WINDOW))
    windows = []
    for start in range(0, len(order), size):
        window = sorted(order[start : start + size], key=lambda place: -len(prompts[place]))
        windows.append([window[at : at + batch_size] for at in range(0, len(window), batch_size)])
    return windows


def kept_answers(folder: Path, name: str) -> dict[tuple[str, str], Reply]:
    """The results of earlier runs, of any number of processes, by prompt; truncated lines are skipped."""
    kept: dict[tuple[str, str], Reply] = {}
    for path in sorted(folder.glob(f"{name}.rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines, which cuts at U+2028
            try:
                row = json.loads(line)
            except ValueError:
                continue
            key, problem = (row["id"], row["prompt_hash"]), row["problem"] and Problem(**row["problem"])
            if row["reply"] is not None or key not in kept:
                kept[key] = Reply(row["reply"], problem, row["seconds"], row["visual_tokens"])
    return kept


def keep(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends answers to a file, on a new line after a truncated one, and waits until they are on disk."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def ask(
    answerer: Answerer,
    samples: Sequence[Sample],
    prompts: Sequence[str],
    shown: Sequence[Sequence[Picture]],
    windows: Sequence[Sequence[Sequence[int]]],
    known: Mapping[tuple[str, str], Reply],
    max_new_tokens: int,
) -> Iterator[list[tuple[int, Reply]]]:
    """Asks the samples of some windows that have no reply yet, batch by batch; `shown` are their pictures."""
    encoded: dict[str, Any] = {}
    for window in windows:
        batches = [
            [place for place in batch if not is_known(known, samples[place], prompts[place])] for batch in window
        ]
        pictures = {picture.key: picture for batch in batches for place in batch for picture in shown[place]}
        started = time.perf_counter()
        # The previous window may have ended within the questions about a picture.
        encoded = {key: encoded[key] for key in pictures if key in encoded}
        fresh = [picture for key, picture in pictures.items() if key not in encoded]
        results, broken = encode(answerer, fresh, max(map(len, batches)))
        encoded |= results
        encoding = (time.perf_counter() - started) / max(1, sum(map(len, batches)))
        for batch in batches:
            unreadable = {
                place: Reply(None, Problem(samples[place].id, "unreadable picture", broken[picture.key]))
                for place in batch
                for picture in shown[place]
                if picture.key in broken
            }
            good = [place for place in batch if place not in unreadable]
            yield [*unreadable.items(), *answers(answerer, prompts, shown, good, encoded, encoding, max_new_tokens)]


def is_known(known: Mapping[tuple[str, str], Reply], sample: Sample, prompt: str) -> bool:
    """Whether a sample has a reply; problems are tried again."""
    reply = known.get((sample.id, prompt_hash(prompt)))
    return reply is not None and reply.text is not None


def answers(
    answerer: Answerer,
    prompts: Sequence[str],
    shown: Sequence[Sequence[Picture]],
    batch: Sequence[int],
    encoded: Mapping[str, Any],
    encoding: float,
    max_new_tokens: int,
) -> list[tuple[int, Reply]]:
    """A batch's replies, with each one's share of the time."""
    if not batch:
        return []
    started = time.perf_counter()
    pictures = [[encoded[picture.key] for picture in shown[place]] for place in batch]
    texts = answerer.answer([prompts[place] for place in batch], pictures, max_new_tokens)
    seconds = encoding + (time.perf_counter() - started) / len(batch)
    counts = [[answerer.visual_tokens(picture) for picture in group] for group in pictures]
    tokens = [None if None in group else sum(filter(None, group)) for group in counts]
    return [(place, Reply(text, None, seconds, count)) for place, text, count in zip(batch, texts, tokens, strict=True)]


def encode(answerer: Answerer, pictures: Sequence[Picture], batch_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Encoded pictures by key, and why the others cannot be read."""
    encoded: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for start in range(0, len(pictures), batch_size or 1):
        batch = pictures[start : start + batch_size]
        try:
            results = answerer.encode([picture.load() for picture in batch])
            encoded |= {picture.key: result for picture, result in zip(batch, results, strict=True)}
        except (ValueError, OSError):  # one by one, to find the unreadable ones
            for picture in batch:
                try:
                    encoded[picture.key] = answerer.encode([picture.load()])[0]
                except (ValueError, OSError) as error:
                    broken[picture.key] = str(error)
    return encoded, broken
