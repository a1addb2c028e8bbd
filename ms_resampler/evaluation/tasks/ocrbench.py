"""OCRBench (arXiv 2305.07895): a thousand questions about text; the score is how many are right."""

from collections.abc import Iterator
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import ocrbench_match
from ..protocol import Task
from ..samples import Columns, Outcome, Sample
from ..sources import HubData, Record, one_of, picture_in, read_json, strings


def records(folder: Path, split: str) -> Iterator[Record]:
    """The list in OCRBench.json, whose pictures lie in OCRBench_Images."""
    for record in read_json(one_of(folder, "OCRBench.json", "OCRBench/OCRBench.json")):
        name = record["image_path"]
        yield record | {"image": picture_in(folder, f"OCRBench_Images/{name}", name)}


def build(record: Columns) -> Sample:
    """A question with one or several right answers."""
    image = record["image"]
    answers = record.any_of("answers", "answer")
    return Sample(
        id=str(record.any_of("id", "row")),
        fields={"question": record["question"]},
        pictures=(image,),
        truth={"answers": [answers] if isinstance(answers, str) else strings(answers),
               "dataset": record.any_of("dataset_name", "dataset")},
        meta={"kind": record.any_of("type", "question_type")},
    )  # fmt: skip


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the reply contains an answer."""
    return Outcome(float(ocrbench_match(reply, sample.truth["answers"], sample.truth["dataset"])), reply or None)


TASK = Task(
    name="ocrbench",
    title="OCRBench",
    hub=HubData("echo840/OCRBench", {"test": "test"}),
    split="test",
    published_split="test",
    prompt="{question}",
    prompt_source="lmms-eval",
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("kind", headline="score", scale=1000),
)
