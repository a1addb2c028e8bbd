"""ScienceQA-IMG (arXiv 2209.09513): school questions with a picture, multiple choice, test split."""

from collections.abc import Iterator
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import scienceqa_letter
from ..protocol import LETTER, LLAVA, Task
from ..samples import Columns, Outcome, Sample, lettered
from ..sources import HubData, Record, one_of, picture_in, read_json


def records(folder: Path, split: str) -> Iterator[Record]:
    """The problems of problems.json that pid_splits.json puts into the split and that have a picture."""
    problems = read_json(one_of(folder, "problems.json"))
    for identifier in read_json(one_of(folder, "pid_splits.json"))[split]:
        problem = problems[identifier]
        if problem.get("image"):
            path = f"{split}/{identifier}/{problem['image']}"
            yield problem | {"id": identifier, "image": picture_in(folder, f"images/{path}", path)}


def build(record: Columns) -> Sample:
    """A problem; its truth is a letter. In the Hub's copy, which has no ids, the number of the row stands for one."""
    choices, hint = record["choices"], record.get("hint")
    question = record["question"]
    image = record["image"]
    return Sample(
        id=str(record.any_of("id", "row")),
        fields={"context": f"Context: {hint}\n" if hint else "", "question": question, "options": lettered(choices)},
        pictures=(image,),
        truth={"letter": "ABCDE"[record["answer"]], "count": len(choices)},
        meta={"subject": record.get("subject"), "grade": record.get("grade")},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the letter is right, by LLaVA's rules."""
    letter = scienceqa_letter(reply, sample.truth["count"])
    return Outcome(float(letter == sample.truth["letter"]), letter)


TASK = Task(
    name="scienceqa",
    title="SQA-I",
    hub=HubData("lmms-lab/ScienceQA", {"test": "test", "val": "validation"}, config="ScienceQA-IMG"),
    split="test",
    published_split="test",
    prompt="{context}" + LETTER,
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("subject"),
)
