"""MMMU (arXiv 2311.16502), validation: college questions with one or several pictures, multiple choice or open."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..aggregation import mean_of_scores
from ..metrics import mmmu_letter, mmmu_open_answers, mmmu_open_match
from ..protocol import Task
from ..samples import Columns, Outcome, Sample, Scored, lettered
from ..sources import HubData, Record, known_split, load_rows, rows_with_pictures, strings

NAMES = {"val": "validation", "test": "test", "dev": "dev"}


def records(folder: Path, split: str) -> Iterator[Record]:
    """The rows of every subject's Parquet table."""
    name = known_split(split, NAMES)
    for subject in sorted(path.parent for path in folder.glob(f"*/{name}-*.parquet")):
        yield from rows_with_pictures(load_rows(str(subject), None, name, "main"), str(subject), None)


def build(record: Columns) -> Sample:
    """A question; options and several right answers are written as the text of Python lists."""
    options = strings(record["options"])
    multiple = record["question_type"] == "multiple-choice"
    question, answer = record["question"], record["answer"]
    mentioned = dict.fromkeys(re.findall(r"<image (\d)>", " ".join([question, *(options if multiple else [])])))
    pictures = [record[f"image_{number}"] for number in mentioned or ["1"]]
    if None in pictures:
        raise ValueError("The question mentions a picture that it does not have.")
    identifier = record["id"]
    letters = "Answer with the option's letter from the given choices directly."
    instruction = (
        f"{lettered(options, '({letter}) {option}')}\n\n{letters}"
        if multiple
        else "Answer the question using a single word or phrase."
    )
    return Sample(
        id=str(identifier),
        fields={"question": question, "instruction": instruction},
        pictures=tuple(pictures),
        truth={"answers": strings(answer), "options": options if multiple else None} if answer != "?" else None,
        meta={"subject": re.sub(r"^[a-z]+_|_\d+$", "", identifier), "kind": record["question_type"]},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the letter, or one of the open answers that the reply allows, is right."""
    answers, options = sample.truth["answers"], sample.truth["options"]
    if options is None:
        return Outcome(float(mmmu_open_match(reply, answers)), mmmu_open_answers(reply) if reply else None)
    letter = mmmu_letter(reply, options)
    return Outcome(float(letter in answers), letter)


def export(scored: Sequence[Scored]) -> tuple[str, dict]:
    """The result file of the evaluation server."""
    return "mmmu_submission.json", {item.sample.id: item.reply for item in scored}


TASK = Task(
    name="mmmu",
    title="MMMU",
    hub=HubData("lmms-lab/MMMU", NAMES, revision="364f2e2eb107b36e07ff4c5a15f5947a759cef47"),
    split="val",
    published_split="val",
    prompt="{question}\n\n{instruction}",
    prompt_source="MMMU's repository, configuration for LLaVA-1.5; pictures first, in the order of their mention",
    records=records,
    build=build,
    score=score,
    aggregation=mean_of_scores("subject", "kind"),
    export=export,
)
