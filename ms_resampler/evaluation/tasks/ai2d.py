"""AI2D (arXiv 1603.07396), test: multiple choice about school diagrams."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import ai2d_letter
from ..protocol import LETTER, Task
from ..samples import Columns, Outcome, Sample, lettered
from ..sources import HubData, Record, one_of, picture_in, read_json, strings


def records(folder: Path, split: str) -> Iterator[Record]:
    """The questions of questions/*.json about the pictures of ai2d_test_ids.csv.

    Where the options are letters in the picture (abcLabel), the picture is that of abc_images, if there are any.
    """
    with one_of(folder, f"ai2d_{split}_ids.csv").open(encoding="utf-8", newline="") as file:
        names = [row[0] for row in csv.reader(file) if row]
    for name in names:
        path = one_of(folder, f"questions/{name}.png.json")
        for question, record in read_json(path)["questions"].items():
            places = ["abc_images", "images"] if record.get("abcLabel") else ["images"]
            yield {
                "id": record.get("questionId", f"{name} {question}"),
                "question": question,
                "options": record["answerTexts"],
                "answer": record["correctAnswer"],
                "image": picture_in(folder, *(f"{place}/{name}.png" for place in places)),
            }


def build(record: Columns) -> Sample:
    """A question; the answer is the index of an option, a number or the text of one."""
    options, image = strings(record["options"]), record["image"]
    letter = "ABCDEFGH"[: len(options)][int(record["answer"])]
    question = record["question"]
    return Sample(
        id=str(record.any_of("id", "row")),
        fields={"question": question, "options": lettered(options)},
        pictures=(image,),
        truth=letter,
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the letter is right."""
    letter = ai2d_letter(reply)
    return Outcome(float(letter == sample.truth), letter)


TASK = Task(
    name="ai2d",
    title="AI2D",
    hub=HubData("lmms-lab/ai2d", {"test": "test"}),
    split="test",
    published_split="test",
    prompt=LETTER,
    prompt_source="lmms-eval",
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores(),
)
