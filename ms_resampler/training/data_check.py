"""`ms-resampler data check`: every record of a data set through the collator, before hours of training."""

import argparse
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
from tqdm import tqdm

from ..folders import model_or_embedded
from ..processing_ms_resampler import MSResamplerProcessor
from .collate import IGNORED, BadRecord, ConversationCollator, errors_of_workers, images_of, open_records
from .label_view import Example, coloured_text, example_of, page

BINS = 8  # of the histogram of lengths
NAMED = 5  # ids printed of each problem


@dataclass(frozen=True)
class Verdict:
    """What came of a record: how long it is, or (`problem`) why it cannot be learned from."""

    record_id: str
    images: int
    tokens: int = 0
    learned: int = 0
    problem: str | None = None
    why: str = ""
    cut: bool = False


class Examiner:
    """Makes verdicts of a list of records, in a worker of a DataLoader."""

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
        return Verdict(str(record["id"]), len(images_of(record)), problem=problem.kind, why=str(problem))

    def _good(self, record: dict[str, Any], collator: ConversationCollator) -> Verdict:
        labels = collator.encode(record)["labels"]
        return Verdict(str(record["id"]), len(images_of(record)), len(labels), int((labels != IGNORED).sum()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `data`."""
    check = parser.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "check",
        help="look at every record as training would, and show what is learned",
        description="Looks at every record as training would: counts what is wrong, and shows what is learned.",
    )
    check.add_argument("source", help=".json, .jsonl, parquet or arrow, a folder of these, or a Hub repository")
    check.add_argument("--model", help="folder or Hub repository of the model to train (default: the embedded one)")
    check.add_argument("--images", metavar="DIR", help="folder of the images (default: that of the source)")
    check.add_argument("--split", default="train", help="of a table (default: %(default)s)")
    check.add_argument("--streaming", action="store_true", help="read a table from the Hub without storing it")
    check.add_argument("--max-length", type=int, default=2048, metavar="N", help="tokens a record may have (2048)")
    check.add_argument("--truncate", action="store_true", help="cut what is longer, instead of counting it as wrong")
    check.add_argument("--plain", action="store_true", help="images and caption alone, as in the stage align")
    check.add_argument(
        "--bad-records", choices=["fatal", "skip"], default="fatal", help="skip: training will leave them out"
    )
    check.add_argument("--examples", type=int, default=2, metavar="N", help="records to show (default: %(default)s)")
    check.add_argument("--html", type=Path, metavar="FILE", help="show them on a page, too")
    check.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report and the examples; the exit code is 2 if training would stop at a record, or has none."""
    if arguments.html is not None and not arguments.html.parent.is_dir():
        raise ValueError(f"There is no folder {str(arguments.html.parent)!r} for the page.")
    processor = MSResamplerProcessor.from_pretrained(model_or_embedded(arguments.model))
    collator = ConversationCollator(processor, arguments.max_length, arguments.plain, arguments.truncate)
    records = open_records(arguments.source, arguments.images, arguments.split, arguments.streaming)
    verdicts = list(examine_all(records, Examiner(collator), arguments.workers))
    good = [verdict for verdict in verdicts if verdict.problem is None]
    report = describe(verdicts, arguments.bad_records)
    examples = list(first_examples(records, collator, arguments.examples)) if good else []
    print(report)
    for example in examples:
        print(f"\n{coloured_text(example)}")
    if arguments.html is not None:
        arguments.html.write_text(page(f"{arguments.source}", report, examples), encoding="utf-8")
        print(f"\nThe examples are in {arguments.html}.")
    return 0 if good and (len(good) == len(verdicts) or arguments.bad_records == "skip") else 2


def examine_all(records: Any, examiner: Examiner, workers: int) -> Iterator[Verdict]:
    """The verdict of every record, in order (those of a stream: as they come), with progress on stderr."""
    total = len(records) if hasattr(records, "__len__") else None
    loader = DataLoader(records, batch_size=16, collate_fn=examiner, num_workers=workers if total != 0 else 0)
    with tqdm(total=total, desc="records", unit="") as progress, errors_of_workers():
        for verdicts in loader:
            yield from verdicts
            progress.update(len(verdicts))


def first_examples(records: Any, collator: ConversationCollator, number: int) -> Iterator[Example]:
    """The first good records, as many as asked for."""
    for record in records:
        if number <= 0:
            return
        with suppress(BadRecord):
            yield example_of(record, collator)
            number -= 1


def describe(verdicts: Sequence[Verdict], bad_records: str) -> str:
    """What there is to say about a data set: problems with ids, lengths, images."""
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
    """Each kind of problem, the most frequent first, with the first ids and one sentence."""
    if not bad:
        return []
    kinds: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in bad:
        kinds[str(verdict.problem)].append(verdict)
    fate = "stop training" if bad_records == "fatal" else "are left out of training"
    lines = [f"{len(bad):,} cannot be learned from, and {fate}:"]
    for kind, verdicts in sorted(kinds.items(), key=lambda item: -len(item[1])):
        ids = first_ids([verdict.record_id for verdict in verdicts])
        lines += [f"  {kind:<20} {len(verdicts):>7,}  {ids}", f"  {'':<20} {'':>7}  {verdicts[0].why}"]
    return lines


def length_lines(good: Sequence[Verdict]) -> list[str]:
    """How long the good records are, as a sentence and a histogram, and how much of them is learned."""
    tokens = np.array([verdict.tokens for verdict in good])
    longest = good[int(tokens.argmax())]
    share = sum(verdict.learned for verdict in good) / tokens.sum()
    counts, edges = np.histogram(tokens, BINS if np.ptp(tokens) >= BINS else 1)
    bars = [
        f"  {round(start):>7,} to {round(end):>7,}  {n:>9,}  {'#' * round(30 * n / counts.max())}".rstrip()
        for start, end, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return [
        f"{tokens.sum():,} tokens, {share:.1%} of them learned. Tokens a record: {tokens.min():,} to {tokens.max():,} "
        f"(the longest is {longest.record_id}), median {np.median(tokens):,.0f}, 95% up to "
        f"{np.quantile(tokens, 0.95):,.0f}.",
        *bars,
    ]
