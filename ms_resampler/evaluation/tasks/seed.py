"""SEED-Bench (arXiv 2307.16125): multiple choice about pictures, and about the middle frames of videos, as in LLaVA."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..protocol import LETTER, LLAVA, Task
from ..samples import Columns, Outcome, Sample, Scored, lettered
from ..sources import HubData, Record, one_of, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record]:
    """The questions of SEED-Bench.json; pictures in SEED-Bench-image, middle frames in SEED-Bench-video-image."""
    data = read_json(one_of(folder, "SEED-Bench.json"))
    kinds = {number: name for name, number in data.get("question_type", {}).items()}
    for question in data["questions"]:
        name, identifier = question["data_id"], question.get("question_id")
        if question.get("data_type") == "video":
            frames = "SEED-Bench-video-image"
            image = picture_in(folder, f"{frames}/{identifier}.png", f"{frames}/{Path(str(name)).stem}.png")
        else:
            image = picture_in(folder, f"SEED-Bench-image/{name}")
        yield question | {"kind": kinds.get(question.get("question_type_id")), "image": image}


def build(record: Columns) -> Sample:
    """A question with four options; its truth is a letter."""
    image = record["image"]
    image = image[len(image) // 2] if isinstance(image, list) else image
    options = [str(record[f"choice_{letter}"]) for letter in "abcd"]
    return Sample(
        id=str(record["question_id"]),
        fields={"question": record["question"], "options": lettered(options)},
        pictures=(image,),
        truth=record["answer"],
        meta={"data": record["data_type"], "kind": record.get("kind")},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the reply is the letter, and nothing else: LLaVA's rule."""
    return Outcome(float(reply == sample.truth), reply if reply in ("A", "B", "C", "D") else None)


def export(scored: Sequence[Scored]) -> tuple[str, list]:
    """The result file of the leaderboard."""
    return "seed_submission.jsonl", [{"question_id": item.sample.id, "prediction": item.reply} for item in scored]


TASK = Task(
    name="seed",
    title="SEED",
    hub=HubData("lmms-lab/SEED-Bench", {"test": "test"}),
    split="test",
    published_split="test",
    prompt=LETTER,
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("data", "kind"),
    picture_key=lambda row: str(row["data_id"]),
    export=export,
)
