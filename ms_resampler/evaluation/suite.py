"""Suites: tasks of your own, each a JSONL file of questions about pictures in the same folder. See docs/evaluation.md.

{"id": "7", "image": "scenes/7.png", "question": "Is there a bus?", "answer": "yes", "kind": "yes/no", "meta": {}}
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .aggregation import Aggregation, Counts, Sums, mean_of_scores
from .metrics import first_yes_or_no, mmbench_letter, only_number, vqa_normalise
from .protocol import LETTER, LLAVA, SHORT, Task
from .samples import Columns, Outcome, Problem, Sample, Scored, lettered, picture_file
from .sources import Record

KINDS = ("yes/no", "choice", "open", "number")
REQUIRED = {"id", "image", "question", "answer", "kind"}
OPTIONAL = {"options", "tolerance", "meta"}


def suite_tasks(path: Path) -> list[Task]:
    """The tasks of a suite's folder, or of one of its files. Raises ValueError if there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{path} is neither a task's JSONL file nor a folder of such files; see docs/evaluation.md.")
    return [suite_task(file) for file in files]


def suite_task(path: Path) -> Task:
    """The task of a suite's file, named as the file."""
    return Task(
        name=path.stem,
        title=path.stem,
        hub=None,
        place=path,
        split=path.parent.name,
        published_split=None,
        prompt="{question}\n{instruction}",
        prompt_source=LLAVA,
        records=records,
        build=build,
        score=score,
        aggregation=beside_a_guess(mean_of_scores()),
    )


def records(path: Path, split: str) -> Iterator[Record | Problem]:
    """The lines of a file; one that is not a JSON object is a problem."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                yield {**json.loads(line), "folder": path.parent}
            except (ValueError, TypeError):
                yield Problem(f"line {number}", "unusable record", "The line is not a JSON object.")


def build(record: Columns) -> Sample:
    """A line as a sample. Raises ValueError if it is not in the documented format."""
    if unknown := record.keys() - REQUIRED - OPTIONAL - {"folder"}:
        raise ValueError(f"The record has unknown fields: {', '.join(sorted(unknown))}; put them into `meta`.")
    kind, options, answers = record["kind"], record.get("options"), listed(record["answer"])
    check_answers(kind, answers, options)
    choices = lettered(options or [])
    instruction = (LETTER if kind == "choice" else SHORT).removeprefix("{question}\n").replace("{options}", choices)
    return Sample(
        id=str(record["id"]),
        fields={"question": record["question"], "options": choices, "instruction": instruction},
        pictures=tuple(picture_file(record["folder"] / name) for name in listed(record["image"])),
        truth={"kind": kind, "answers": answers, "options": options, "tolerance": record.get("tolerance", 0)},
        meta={"kind": kind, **record.get("meta", {})},
    )


def listed(value: Any) -> list[str]:
    """One or several, as a list of strings."""
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def check_answers(kind: str, answers: list[str], options: list[str] | None) -> None:
    """Raises ValueError unless the answers and options fit the kind."""
    if kind not in KINDS:
        raise ValueError(f"The kind is {kind!r}; it is one of {', '.join(KINDS)}.")
    if (kind == "choice") != (options is not None):
        raise ValueError("A record has `options` if its kind is `choice`, and only then.")
    if not answers:
        raise ValueError("The record has no answer.")
    allowed = {"yes/no": ["yes", "no"], "choice": [chr(65 + index) for index in range(len(options or []))]}.get(kind)
    if allowed is not None and not set(answers) <= set(allowed):
        raise ValueError(f"The answer is {answers[0]!r}; for this record it is one of {', '.join(allowed)}.")
    if kind == "number":
        for answer in answers:
            float(answer)


def score(sample: Sample, reply: str) -> Outcome:
    """Whether a reply is right, by the rules of its kind."""
    answers, kind = sample.truth["answers"], sample.truth["kind"]
    if kind == "number":
        number, tolerance = only_number(reply), sample.truth["tolerance"]
        wanted = [float(answer) for answer in answers]
        right = number is not None and any(abs(number - truth) <= tolerance * abs(truth) for truth in wanted)
        return Outcome(float(right), number)
    if kind == "open":
        answer = vqa_normalise(reply)
        return Outcome(float(answer in map(vqa_normalise, answers)), answer or None)
    options = {chr(65 + index): option for index, option in enumerate(sample.truth["options"] or [])}
    said = mmbench_letter(reply, options) if kind == "choice" else first_yes_or_no(reply)
    return Outcome(float(said in answers), said)


def beside_a_guess(aggregation: Aggregation) -> Aggregation:
    """An aggregation with one more number, "guess": the score of always giving the most common answer.

    It is found for each form of question: each kind, and each value of the field `asks` of `meta` where there is one.
    """

    def tally(scored: Sequence[Scored]) -> Iterable[tuple[str, Counts]]:
        yield from aggregation.tally(scored)
        for item in scored:
            form = f"{item.sample.truth['kind']} {item.sample.meta.get('asks', '')}"
            yield item.sample.unit, {f"answer|{form}|{item.sample.truth['answers'][0]}": 1.0}

    def finish(sums: Sums) -> dict[str, np.ndarray]:
        by_form = defaultdict(list)
        for name, counts in sums.items():
            if name.startswith("answer|"):
                by_form[name.split("|")[1]].append(counts)
        right = sum(np.max(counts, axis=0) for counts in by_form.values())
        others = {name: counts for name, counts in sums.items() if not name.startswith("answer|")}
        return aggregation.finish(others) | {"guess": aggregation.scale * right / sums["n"]}

    return Aggregation(tally, finish, aggregation.headline, aggregation.scale)
