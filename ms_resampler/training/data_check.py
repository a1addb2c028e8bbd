"""`check_data`: puts every record of a data set through the collator, before hours of training."""

import copy
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ..folders import our_model
from ..processing_ms_resampler import MSResamplerProcessor
from ..progress import progress
from .collate import IGNORED, ConversationCollator, errors_of_workers, mend_template
from .conversations import BadRecord, images_of, name_of
from .label_view import Example, example_of
from .records import open_records

BINS = 8  # of the histogram of lengths
NAMED = 5  # ids printed of each problem


@dataclass(frozen=True)
class Verdict:
    """The result for a record: its length, or (`problem`) why it cannot be trained on."""

    record_id: str
    images: int = 0
    tokens: int = 0
    learned: int = 0
    problem: str | None = None
    why: str = ""
    cut: bool = False


class Examiner:
    """Makes verdicts for a list of records, in a worker of a DataLoader."""

    def __init__(self, collator: ConversationCollator):
        self.collator = collator
        self.whole = copy.copy(collator)
        self.whole.truncate = False

    def __call__(self, records: Sequence[dict[str, Any]]) -> list[Verdict]:
        return [self.examine(record) for record in records]

    def examine(self, record: dict[str, Any]) -> Verdict:
        """One record's verdict."""
        try:
            return self._good(record, self.whole)
        except BadRecord as error:
            problem = error
        if problem.kind == "too long" and self.collator.truncate:
            with suppress(BadRecord):
                return replace(self._good(record, self.collator), cut=True)
        return Verdict(name_of(record), problem=problem.kind, why=str(problem))

    def _good(self, record: dict[str, Any], collator: ConversationCollator) -> Verdict:
        labels = collator.encode(record)["labels"]
        return Verdict(name_of(record), len(images_of(record)), len(labels), int((labels != IGNORED).sum()))


@dataclass(frozen=True)
class DataReport:
    """The verdicts on all records, and the first good ones with their labels; `str(report)` is the report."""

    verdicts: list[Verdict]
    examples: list[Example]
    bad_records: str
    note: str | None = None  # on the chat template

    @property
    def trainable(self) -> bool:
        """Whether training would run: there is a good record, and no bad one unless they are skipped."""
        good = [verdict for verdict in self.verdicts if verdict.problem is None]
        return bool(good) and (len(good) == len(self.verdicts) or self.bad_records == "skip")

    def __str__(self) -> str:
        return "\n".join([describe(self.verdicts, self.bad_records), *filter(None, [self.note])])


def check_data(
    data: str | Path,
    *,
    model: str | Path | None = None,
    images: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    max_length: int = 2048,
    truncate: bool = False,
    plain: bool = False,
    bad_records: str = "fatal",
    examples: int = 2,
    workers: int | None = None,
) -> DataReport:
    """Checks every record of a data set as training would.

    `data`, `images`, `split` and `streaming` are what `open_records` takes, `model` the one to train (default: the
    embedded one), `max_length`, `truncate` and `bad_records` ("fatal" or "skip") those of the recipe; `plain` is for
    recipes of plain captions. `examples` is how many good records to show, `workers` the processes (default: one
    per core). Raises ValueError or OSError if the data cannot be read or the model is not of this package.
    """
    for name, value, least in (("max_length", max_length, 1), ("examples", examples, 0), ("workers", workers, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    processor = MSResamplerProcessor.from_pretrained(our_model(model))
    note = None if plain else mend_template(processor)
    collator = ConversationCollator(processor, max_length, plain, truncate)
    records = open_records(data, images, split, streaming)
    workers = (os.cpu_count() or 1) if workers is None else workers
    verdicts = list(examine_all(records, Examiner(collator), workers))
    return DataReport(verdicts, list(first_examples(records, collator, examples)), bad_records, note)


def examine_all(records: Any, examiner: Examiner, workers: int) -> Iterator[Verdict]:
    """The verdict of every record, in order (those of a stream: as they come), with progress on stderr."""
    total = len(records) if hasattr(records, "__len__") else None
    loader = DataLoader(records, batch_size=16, collate_fn=examiner, num_workers=workers if total != 0 else 0)
    with progress(total=total, desc="records", unit="") as bar, errors_of_workers():
        for verdicts in loader:
            yield from verdicts
            bar.update(len(verdicts))


def first_examples(records: Any, collator: ConversationCollator, number: int) -> Iterator[Example]:
    """The first good records, as many as asked for."""
    for record in records:
        if number <= 0:
            return
        with suppress(BadRecord):
            yield example_of(record, collator)
            number -= 1


def describe(verdicts: Sequence[Verdict], bad_records: str) -> str:
    """The report on a data set: problems with ids, lengths, images."""
    good = [verdict for verdict in verdicts if verdict.problem is None]
    lines = [f"{len(verdicts):,} records, {len(good):,} of them good."]
    lines += problem_lines([verdict for verdict in verdicts if verdict.problem is not None], bad_records)
    if good:
        lines += length_lines(good)
        counts = sorted(Counter(verdict.images for verdict in good).items())
        lines.append("Images a record: " + ", ".join(f"{images} in {n:,}" for images, n in counts) + ".")
    if cut := [verdict.record_id for verdict in good if verdict.cut]:
        lines.append(f"{len(cut):,} are cut at {max(verdict.tokens for verdict in good):,} tokens: {first_ids(cut)}.")
    return "\n".join(lines)


def first_ids(ids: Sequence[str]) -> str:
    """The first few ids."""
    return ", ".join(ids[:NAMED]) + (", ..." if len(ids) > NAMED else "")


def problem_lines(bad: Sequence[Verdict], bad_records: str) -> list[str]:
    """Each kind of problem, most frequent first, with the first ids and one sentence."""
    if not bad:
        return []
    kinds: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in bad:
        kinds[str(verdict.problem)].append(verdict)
    fate = "stop training" if bad_records == "fatal" else "are left out of training"
    lines = [f"{len(bad):,} cannot be trained on, and {fate}:"]
    for kind, verdicts in sorted(kinds.items(), key=lambda item: -len(item[1])):
        ids = first_ids([verdict.record_id for verdict in verdicts])
        lines += [f"  {kind:<20} {len(verdicts):>7,}  {ids}", f"  {'':<20} {'':>7}  {verdicts[0].why}"]
    return lines


def length_lines(good: Sequence[Verdict]) -> list[str]:
    """The lengths of the good records, as a sentence and a histogram, and the share of trained tokens."""
    tokens = np.array([verdict.tokens for verdict in good])
    longest = good[int(tokens.argmax())]
    share = sum(verdict.learned for verdict in good) / tokens.sum()
    counts, edges = np.histogram(tokens, BINS if np.ptp(tokens) >= BINS else 1)
    bars = [
        f"  {round(start):>7,} to {round(end):>7,}  {n:>9,}  {'#' * round(30 * n / counts.max())}".rstrip()
        for start, end, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return [
        f"{tokens.sum():,} tokens, {share:.1%} of them trained. Tokens a record: {tokens.min():,} to {tokens.max():,} "
        f"(the longest is {longest.record_id}), median {np.median(tokens):,.0f}, 95% up to "
        f"{np.quantile(tokens, 0.95):,.0f}.",
        *bars,
    ]
