"""MM-Vet (arXiv 2308.02490): open questions that need several abilities, graded from 0 to 1 by a judge."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..protocol import LLAVA, Judge, Task
from ..samples import Columns, Outcome, Sample, Scored
from ..sources import HubData, Record, one_of, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record]:
    """The questions of mm-vet.json: an object with the questions' ids as keys."""
    for identifier, record in read_json(one_of(folder, "mm-vet.json")).items():
        image = picture_in(folder, f"images/{record['imagename']}")
        yield record | {"question_id": identifier, "image": image}


def build(record: Columns) -> Sample:
    """A question; its truth may join alternatives with <OR> and parts with <AND>."""
    abilities = record["capability"]
    return Sample(
        id=str(record["question_id"]),
        fields={"question": record["question"]},
        pictures=(record["image"],),
        truth=record["answer"],
        meta={"ability": abilities.split(",") if isinstance(abilities, str) else list(abilities)},
    )


def judged(sample: Sample, reply: str, judge: Judge) -> Outcome:
    """The judge's grade. Raises ValueError if it is not a number from 0 to 1."""
    question = sample.fields["question"]
    said = judge(task="mmvet", question=question, truth=sample.truth, options={}, reply=reply)
    grade = float(said.split()[0])
    if not 0 <= grade <= 1:
        raise ValueError(f"The judge's grade is {grade:g}, and should be from 0 to 1.")
    return Outcome(grade, grade)


def export(scored: Sequence[Scored]) -> tuple[str, dict]:
    """The predictions of MM-Vet's evaluator."""
    return "mmvet_predictions.json", {item.sample.id: item.reply for item in scored}


TASK = Task(
    name="mmvet",
    title="MM-Vet",
    hub=HubData("lmms-lab/MMVet", {"test": "test"}),
    split="test",
    published_split="test",
    prompt="{question}",
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=lambda sample, reply: Outcome(math.nan, None),
    judge=judged,
    aggregation=mean_of_scores("ability", headline="grade"),
    export=export,
    max_new_tokens=1024,
)
