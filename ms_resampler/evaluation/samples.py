"""Samples with pictures and true answers, and the verdicts on replies."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A task's data differ from the release: the message names the missing file, split or column."""


class Columns(dict):
    """A record. A missing column raises DataError, with the names of the existing ones."""

    def __missing__(self, name: str) -> Any:
        raise DataError(f"There is no column {name!r}; there are {', '.join(map(str, sorted(self)))}.")

    def any_of(self, *names: str) -> Any:
        """The value of the first of some columns that exists."""
        return self[next((name for name in names if name in self), names[0])]


@dataclass(frozen=True)
class Picture:
    """A picture that is opened only when needed: `load` returns a source for the processor (path, bytes, base64).

    Pictures with the same key are the same: they are encoded once, and resampled together.
    """

    key: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """A question about pictures.

    fields: the fields of the prompt's template: `question`, and others of the task (`options`, `hint`).
    truth: what the metric compares with; None if the answers are not public, so that replies are only exported.
    group: questions that are scored together (MMBench's rotations, MME's pairs); by default the sample alone.
    meta: columns that results are broken down by, or that an export needs.
    """

    id: str
    fields: Mapping[str, str]
    pictures: tuple[Picture, ...]
    truth: Any
    group: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """The unit that the bootstrap draws: the pictures, or the sample if it has none."""
        return " ".join(picture.key for picture in self.pictures) or self.id


@dataclass(frozen=True)
class Problem:
    """A sample that could not be used, and why: it is counted and named, and left out of the score."""

    id: str
    kind: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """The score of a reply in [0, 1], and how it was parsed; None if it could not be.

    A reply that cannot be parsed gets the score of the benchmark's official metric, and is counted.
    """

    score: float
    parsed: Any


@dataclass(frozen=True)
class Scored:
    """A sample, the model's reply to it, and the verdict."""

    sample: Sample
    reply: str
    outcome: Outcome


def picture_file(path: Path) -> Picture:
    """A picture in a file, which is checked when it is opened."""
    return stored_picture(str(path), path)


def stored_picture(key: str, content: Any) -> Picture:
    """A picture given as a path, bytes or base64."""
    return Picture(key, lambda: content)


def lettered(options: Iterable[str], form: str = "{letter}. {option}") -> str:
    """Options, one a line, with letters: "A. a cat"."""
    return "\n".join(form.format(letter=chr(65 + index), option=option) for index, option in enumerate(options))
