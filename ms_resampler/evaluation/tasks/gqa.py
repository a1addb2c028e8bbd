"""GQA (arXiv 1902.09506), testdev balanced: compositional questions, exact match."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import gqa_normalise
from ..protocol import LLAVA, SHORT, Task
from ..samples import Columns, Outcome, Sample, Scored
from ..sources import HubData, Record, one_of, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record]:
    """The questions of testdev_balanced_questions.json: an object with the questions' ids as keys."""
    path = one_of(folder, f"{split}_balanced_questions.json", f"questions/{split}_balanced_questions.json")
    for identifier, question in read_json(path).items():
        image = picture_in(folder, f"images/{question['imageId']}.jpg")
        yield question | {"id": identifier, "image": image}


def build(record: Columns) -> Sample:
    """A question with its one answer."""
    kinds = record.get("types") or {}
    return Sample(
        id=str(record["id"]),
        fields={"question": record["question"]},
        pictures=(record["image"],),
        truth=record["answer"],
        meta={"structural": kinds.get("structural"), "semantic": kinds.get("semantic")},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Exact match, after lower case and without a final period."""
    answer = gqa_normalise(reply)
    return Outcome(float(answer == sample.truth), answer or None)


def export(scored: Sequence[Scored]) -> tuple[str, list]:
    """The predictions of GQA's eval.py."""
    rows = [{"questionId": item.sample.id, "prediction": gqa_normalise(item.reply)} for item in scored]
    return "testdev_balanced_predictions.json", rows


TASK = Task(
    name="gqa",
    title="GQA",
    hub=HubData(
        "lmms-lab/GQA",
        {"testdev": "testdev"},
        config="testdev_balanced_instructions",
        revision="a6e72d6e1b912da88af8b2f9eba05d5ea8ec2dd8",
        picture_config="testdev_balanced_images",
        picture_id="imageId",
    ),
    split="testdev",
    published_split="testdev",
    prompt=SHORT,
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("structural", "semantic"),
    export=export,
)
