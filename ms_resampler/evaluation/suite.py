"""Suites: tasks of one's own, each a JSONL file of questions about pictures in the same folder. See docs/evaluation.md.

{"id": "7", "image": "scenes/7.png", "question": "Is there a bus?", "answer": "yes", "kind": "yes/no", "meta": {}}
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .samples import DataError, Problem, Sample, lettered, picture_file

KINDS = ("yes/no", "choice", "open", "number")
REQUIRED = {"id", "image", "question", "answer", "kind"}
OPTIONAL = {"options", "tolerance", "meta"}


def read_suite_file(path: Path) -> Iterator[Sample | Problem]:
    """The samples of a suite's JSONL file; a line that cannot be used is a Problem.

    Raises DataError if no line has the required fields.
    """
    seen: set[str] = set()
    usable = 0
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sample = suite_sample(json.loads(line), path)
            if sample.id in seen:
                raise ValueError(f"The id {sample.id!r} is there twice.")
        except ValueError as error:
            yield Problem(f"line {number}", "unusable record", str(error))
            continue
        seen.add(sample.id)
        usable += 1
        yield sample
    if not usable:
        raise DataError(f"{path} has no usable line; a line has {', '.join(sorted(REQUIRED))}. See docs/evaluation.md.")


def suite_sample(record: Any, path: Path) -> Sample:
    """A line of a suite's file as a sample. Raises ValueError if it is not of the documented form."""
    if not isinstance(record, dict):
        raise ValueError("The line is not a JSON object.")
    if missing := REQUIRED - record.keys():
        raise ValueError(f"The record lacks {', '.join(sorted(missing))}.")
    if unknown := record.keys() - REQUIRED - OPTIONAL:
        raise ValueError(f"The record has unknown fields: {', '.join(sorted(unknown))}; put them into `meta`.")
    kind, options, answers = record["kind"], record.get("options"), listed(record["answer"])
    if kind not in KINDS:
        raise ValueError(f"The kind is {kind!r}; it is one of {', '.join(KINDS)}.")
    if (kind == "choice") != (options is not None):
        raise ValueError("`options` belongs to the kind `choice`, and to no other.")
    check_answers(kind, answers, options)
    return Sample(
        id=str(record["id"]),
        fields={"question": record["question"], "options": lettered(options or [])},
        pictures=tuple(picture_file(path.parent / name) for name in listed(record["image"])),
        truth={"kind": kind, "answers": answers, "options": options, "tolerance": record.get("tolerance", 0)},
        meta={"kind": kind, **record.get("meta", {})},
    )


def listed(value: Any) -> list[str]:
    """One or several, as a list of strings."""
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def check_answers(kind: str, answers: list[str], options: list[str] | None) -> None:
    """Raises ValueError unless the answers are of the kind."""
    if not answers:
        raise ValueError("The record has no answer.")
    allowed = {"yes/no": ["yes", "no"], "choice": [chr(65 + index) for index in range(len(options or []))]}.get(kind)
    if allowed is not None and not set(answers) <= set(allowed):
        raise ValueError(f"The answer is {answers[0]!r}; for this record it is one of {', '.join(allowed)}.")
    if kind == "number":
        for answer in answers:
            float(answer)
