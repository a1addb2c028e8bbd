"""ChartQA (arXiv 2203.10244), test: people's and generated questions about charts, with a tolerance of 5%."""

from collections.abc import Iterator
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import relaxed_match
from ..protocol import Task
from ..samples import Columns, Outcome, Problem, Sample
from ..sources import HubData, Record, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record | Problem]:
    """The lists in test_human.json and test_augmented.json; one that is missing is a problem."""
    folder = folder / split if (folder / split).is_dir() else folder
    for kind in ("human", "augmented"):
        path = folder / f"{split}_{kind}.json"
        if not path.is_file():
            yield Problem(kind, "missing split", f"{folder} has no {path.name}.")
            continue
        for number, record in enumerate(read_json(path)):
            image = picture_in(folder, f"png/{record['imgname']}")
            yield record | {"id": f"{kind} {number}", "type": kind, "image": image}


def build(record: Columns) -> Sample:
    """A question with its one answer."""
    image = record["image"]
    return Sample(
        id=str(record.any_of("id", "row")),
        fields={"question": record.any_of("query", "question")},
        pictures=(image,),
        truth=str(record.any_of("label", "answer")),
        meta={"split": record["type"].removesuffix("_test")},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Relaxed accuracy."""
    return Outcome(float(relaxed_match(reply, sample.truth)), reply or None)


TASK = Task(
    name="chartqa",
    title="ChartQA",
    hub=HubData("lmms-lab/ChartQA", {"test": "test"}),
    split="test",
    published_split="test",
    prompt="{question}\nAnswer the question with a single word.",
    prompt_source="lmms-eval",
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("split"),
)
