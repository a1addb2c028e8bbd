"""What every task is made of: samples with pictures and truth, and what a reply to one is worth."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A task's data are not what the release has: a missing file, split or column, named in the message."""


class Columns(dict):
    """A record. A column that it does not have raises DataError, with the names of those that it has."""

    def __missing__(self, name: str) -> Any:
        raise DataError(f"There is no column {name!r}; there are {', '.join(map(str, sorted(self)))}.")

    def any_of(self, *names: str) -> Any:
        """The value of the first of some columns that is there."""
        return self[next((name for name in names if name in self), names[0])]


@dataclass(frozen=True)
class Picture:
    """A picture, opened only when it is asked about: `load` returns what the processor opens (path, bytes, base64).

    Pictures with the same key are the same picture: they are encoded once, and resampled together.
    """

    key: str
    load: Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """A question about pictures.

    fields: what the prompt's template is filled with: `question`, and what else the task names (`options`, `hint`).
    truth: what the metric compares with; None where the answers are not public, so that answers are only exported.
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
        """What the bootstrap draws: the pictures, or the sample where there are none."""
        return " ".join(picture.key for picture in self.pictures) or self.id


@dataclass(frozen=True)
class Problem:
    """A sample that could not be used, and why: it is counted and named, and takes no part in the score."""

    id: str
    kind: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """What a reply is worth, in [0, 1], and what was understood of it; `parsed` None means nothing was.

    A reply that cannot be parsed gets what the benchmark's official metric gives it, and is counted.
    """

    score: float
    parsed: Any


@dataclass(frozen=True)
class Scored:
    """A sample, the model's reply to it, and what that is worth."""

    sample: Sample
    reply: str
    outcome: Outcome


def picture_file(path: Path) -> Picture:
    """A picture in a file, which may turn out to be missing or damaged when it is opened."""
    return stored_picture(str(path), path)


def stored_picture(key: str, content: Any) -> Picture:
    """A picture that is at hand: a path, bytes or base64."""
    return Picture(key, lambda: content)


def lettered(options: Iterable[str], form: str = "{letter}. {option}") -> str:
    """Options, one a line, with letters: "A. a cat"."""
    return "\n".join(form.format(letter=chr(65 + index), option=option) for index, option in enumerate(options))
