"""VizWiz-VQA (arXiv 1802.08218): blind people's own pictures and questions, many of which cannot be answered.

Published rows are of the test split, on a server.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import evalai_normalise, vqa_accuracy
from ..protocol import LLAVA, Task
from ..samples import Columns, Outcome, Sample, Scored
from ..sources import HubData, Record, one_of, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record]:
    """The list in val.json or test.json, which names the pictures in the folder of the split."""
    for record in read_json(one_of(folder, f"{split}.json", f"Annotations/{split}.json")):
        name = record["image"]
        yield record | {"question_id": name, "image": picture_in(folder, f"{split}/{name}", f"images/{split}/{name}")}


def build(record: Columns) -> Sample:
    """A question; its truth is the list of the ten answers, objects in the release and strings on the Hub."""
    answers = record.get("answers")
    return Sample(
        id=str(record["question_id"]),
        fields={"question": record["question"]},
        pictures=(record["image"],),
        truth=[answer if isinstance(answer, str) else answer["answer"] for answer in answers] if answers else None,
        meta={"answer type": record.get("answer_type", record.get("category"))},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """VQA accuracy of the reply as LLaVA submits it."""
    answer = evalai_normalise(reply)
    return Outcome(vqa_accuracy(answer, sample.truth), answer or None)


def export(scored: Sequence[Scored]) -> tuple[str, list]:
    """The result file of the evaluation server."""
    names = [item.sample.id if item.sample.id.endswith(".jpg") else f"{item.sample.id}.jpg" for item in scored]
    answers = [evalai_normalise(item.reply) for item in scored]
    return "vizwiz_submission.json", [{"image": n, "answer": a} for n, a in zip(names, answers, strict=True)]


TASK = Task(
    name="vizwiz",
    title="VizWiz",
    hub=HubData("lmms-lab/VizWiz-VQA", {"val": "val", "test": "test"}),
    split="val",
    published_split="test",
    prompt="{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("answer type"),
    export=export,
)
