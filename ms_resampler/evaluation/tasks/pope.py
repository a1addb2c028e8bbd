"""POPE (arXiv 2305.10355): is an object there? Three splits by how the absent objects are chosen; COCO's pictures."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..aggregation import Aggregation, Counts, Sums
from ..metrics import first_yes_or_no, pope_answer
from ..protocol import LLAVA, SHORT, Task
from ..samples import Columns, Outcome, Problem, Sample, Scored
from ..sources import HubData, Record, picture_in, read_jsonl

SPLITS = ("random", "popular", "adversarial")


def records(folder: Path, split: str) -> Iterator[Record | Problem]:
    """The lines of coco_pope_random.json, _popular and _adversarial; one that is missing is a problem."""
    for category in SPLITS:
        path = next(folder.glob(f"**/coco_pope_{category}.json"), None)
        if path is None:
            yield Problem(category, "missing split", f"{folder} has no coco_pope_{category}.json.")
            continue
        for record in read_jsonl(path):
            image = picture_in(folder, f"val2014/{record['image']}", record["image"])
            yield record | {"category": category, "image": image}


def build(record: Columns) -> Sample:
    """A question; its truth is yes or no. Ids repeat from split to split, so that the split is a part of them."""
    category, answer = record["category"], record.any_of("label", "answer")
    if category not in SPLITS or answer.strip().lower() not in ("yes", "no"):
        raise ValueError(f"{category!r} and {answer!r} are not a split of POPE and one of its answers.")
    return Sample(
        id=f"{category} {record['question_id']}",
        fields={"question": record.any_of("text", "question")},
        pictures=(record["image"],),
        truth=answer.strip().lower(),
        meta={"category": category},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """POPE counts any reply without a denial as yes; one without yes or no is also counted as not understood."""
    answer = pope_answer(reply)
    understood = answer == "no" or first_yes_or_no(reply)
    return Outcome(float(answer == sample.truth), answer if understood else None)


def tally(scored: Sequence[Scored]) -> Iterable[tuple[str, Counts]]:
    """Which of the four cases each sample is, by split."""
    for item in scored:
        right = item.outcome.score == 1
        said_yes = (item.sample.truth == "yes") == right
        yield item.sample.unit, {f"{item.sample.meta['category']} {'true' if right else 'false'} {said_yes}": 1.0}


def finish(sums: Sums) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall, F1 and the share of yes, by split; F1 and accuracy as means of the splits."""
    numbers = {}
    zero = np.zeros_like(next(iter(sums.values())))
    splits = [split for split in SPLITS if any(name.startswith(split) for name in sums)]
    for split in splits:
        cases = [f"{split} {case}" for case in ("true True", "false True", "true False", "false False")]
        tp, fp, tn, fn = (sums.get(case, zero) for case in cases)
        numbers[f"accuracy {split}"] = 100 * (tp + tn) / (tp + fp + tn + fn)
        numbers[f"precision {split}"] = 100 * tp / (tp + fp)
        numbers[f"recall {split}"] = 100 * tp / (tp + fn)
        numbers[f"F1 {split}"] = 100 * 2 * tp / (2 * tp + fp + fn)
        numbers[f"yes {split}"] = 100 * (tp + fp) / (tp + fp + tn + fn)
    means = {name: np.mean([numbers[f"{name} {split}"] for split in splits], axis=0) for name in ("F1", "accuracy")}
    return means | numbers


TASK = Task(
    name="pope",
    title="POPE",
    hub=HubData("lmms-lab/POPE", {"test": "test"}, revision="4db1276663dfa5eb8ad16a52d24c31a09e470896"),
    split="test",
    published_split="test",
    prompt=SHORT,
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=Aggregation(tally, finish, "F1"),
    picture_key=lambda row: str(row["image_source"]),
)
