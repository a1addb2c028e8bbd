"""MME (arXiv 2306.13394): two yes-or-no questions a picture, in fourteen categories. Tables show the perception sum."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..aggregation import Aggregation, Counts, Sums, groups_of
from ..metrics import mme_answer
from ..protocol import LLAVA, SHORT, Task
from ..samples import Columns, DataError, Outcome, Problem, Sample, Scored, picture_file
from ..sources import HubData, Record

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
INSTRUCTION = " Please answer yes or no."


def records(folder: Path, split: str) -> Iterator[Record | Problem]:
    """The two lines of every text file; pictures beside it, or in `images` beside `questions_answers_YN`."""
    inner = folder / "MME_Benchmark_release_version"
    folder = inner if inner.is_dir() else folder
    found = [category for category in (*PERCEPTION, *COGNITION) if (folder / category).is_dir()]
    if not found:
        raise DataError(f"{folder} has none of MME's categories: {', '.join((*PERCEPTION, *COGNITION))}.")
    for category in (*PERCEPTION, *COGNITION):
        if category not in found:
            yield Problem(category, "missing split", f"{folder} has no folder {category}.")
            continue
        texts, pictures = folder / category / "questions_answers_YN", folder / category / "images"
        if not texts.is_dir():
            texts = pictures = folder / category
        for path in sorted(texts.glob("*.txt")):
            lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if len(lines) != 2 or any(len(line) != 2 for line in lines):
                yield Problem(f"{category}/{path.name}", "unusable record", "The file does not hold two questions.")
                continue
            image = next((file for file in sorted(pictures.glob(f"{path.stem}.*")) if file != path), path)
            for question, answer in lines:
                yield {
                    "question_id": f"{category}/{image.name}",
                    "category": category,
                    "question": question,
                    "answer": answer,
                    "image": picture_file(image),
                }


def build(record: Columns) -> Sample:
    """A question; its truth is yes or no, its group the picture's pair."""
    group, question = record["question_id"], record["question"].strip()
    answer = record["answer"].strip().lower().replace(".", "")
    if answer not in ("yes", "no"):
        raise ValueError(f"The answer is {answer!r}, and should be yes or no.")
    return Sample(
        id=f"{group} {question}",
        fields={"question": question.replace(INSTRUCTION, "").rstrip()},
        pictures=(record["image"],),
        truth=answer,
        group=group,
        meta={"category": record["category"]},
    )


def score(sample: Sample, reply: str) -> Outcome:
    """Whether the first four characters hold the right word."""
    answer = mme_answer(reply)
    return Outcome(float(answer == sample.truth), answer)


def tally(scored: Sequence[Scored]) -> Iterable[tuple[str, Counts]]:
    """Questions, right ones, pictures, and pictures with both right, by category."""
    for pair in groups_of(scored):
        category, right = pair[0].sample.meta["category"], sum(item.outcome.score for item in pair)
        counts = {"questions": len(pair), "right": right, "pictures": 1, "both": float(right == len(pair))}
        yield pair[0].sample.unit, {f"{category} {name}": float(count) for name, count in counts.items()}


def finish(sums: Sums) -> dict[str, np.ndarray]:
    """Accuracy plus accuracy+ of every category, and their sums."""
    numbers: dict[str, np.ndarray] = {}
    for category in (*PERCEPTION, *COGNITION):
        if f"{category} questions" in sums:
            accuracy = 100 * sums[f"{category} right"] / sums[f"{category} questions"]
            both = 100 * sums[f"{category} both"] / sums[f"{category} pictures"]
            numbers |= {category: accuracy + both, f"{category} accuracy": accuracy, f"{category} accuracy+": both}
    zero = np.zeros_like(next(iter(sums.values())))
    perception, cognition = (
        sum((numbers[category] for category in part if category in numbers), start=zero)
        for part in (PERCEPTION, COGNITION)
    )
    return {"perception": perception, "cognition": cognition, "total": perception + cognition} | numbers


TASK = Task(
    name="mme",
    title="MME-P",
    hub=HubData("lmms-lab/MME", {"test": "test"}, revision="d6c9023f017b564f7b3ccccf5348166bce8fdbcd"),
    split="test",
    published_split="test",
    prompt=SHORT,
    prompt_source=LLAVA,
    records=records,
    build=build,
    score=score,
    aggregation=Aggregation(tally, finish, "perception", scale=2000),
    group_size=2,
    picture_key=lambda row: str(row["question_id"]),
)
