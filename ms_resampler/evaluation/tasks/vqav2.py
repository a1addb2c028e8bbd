"""VQAv2 (arXiv 1612.00837): short questions with ten people's answers. Published rows are of test-dev, on a server."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import evalai_normalise, vqa_accuracy
from ..protocol import LLAVA, SHORT, Task
from ..samples import Columns, Outcome, Sample, Scored
from ..sources import HubData, Record, known_split, one_of, picture_in, read_json

FILES = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}


def records(folder: Path, split: str) -> Iterator[Record]:
    """The questions of v2_OpenEnded_mscoco_*_questions.json, with their annotations if there are any."""
    name = known_split(split, FILES)
    questions = read_json(one_of(folder, f"v2_OpenEnded_mscoco_{name}_questions.json"))["questions"]
    annotations = {}
    if split == "val":
        path = one_of(folder, f"v2_mscoco_{name}_annotations.json")
        annotations = {row["question_id"]: row for row in read_json(path)["annotations"]}
    pictures = name.replace("-dev", "")
    for question in questions:
        image = picture_in(folder, f"{pictures}/COCO_{pictures}_{question['image_id']:012d}.jpg")
        yield annotations.get(question["question_id"], {}) | question | {"image": image}


def build(record: Columns) -> Sample:
    """A question; its truth is the list of the ten answers."""
    answers = record.get("answers")
    return Sample(
        id=str(record["question_id"]),
        fields={"question": record["question"]},
        pictures=(record["image"],),
        truth=[answer["answer"] for answer in answers] if answers else None,
        meta={"answer type": record.get("answer_type")},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """VQA accuracy of the reply as LLaVA submits it."""
    answer = evalai_normalise(reply)
    return Outcome(vqa_accuracy(answer, sample.truth), answer or None)


def export(scored: Sequence[Scored]) -> tuple[str, list]:
    """The result file of the evaluation server."""
    rows = [{"question_id": int(item.sample.id), "answer": evalai_normalise(item.reply)} for item in scored]
    return "vqav2_submission.json", rows


TASK = Task(
    name="vqav2",
    title="VQAv2",
    hub=HubData(
        "lmms-lab/VQAv2",
        {"val": "validation", "test-dev": "testdev", "test": "test"},
        revision="32665d35052eb4a6d4414851c3c829a72754915a",
    ),
    split="val",
    published_split="test-dev",
    prompt=SHORT,
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("answer type"),
    picture_key=lambda row: str(row["image_id"]),
    export=export,
)
