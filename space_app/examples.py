"""The example pictures, what is asked about them, and the truth where it is known."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conversation import pictures_of, text_of
from known import SUGGESTED, Note
from pictures import open_picture
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent / "examples"
MEASURED = 16


@dataclass(frozen=True)
class Example:
    """A picture of the folder, a question about it, words for who does not see it, and the answer if it is known.

    opening: the page opens with it. large: what tiles are for; it is not among those that are usual.
    """

    file: str
    question: str
    alt: str = ""
    truth: str | None = None
    opening: bool = False
    large: bool = False

    @property
    def path(self) -> str:
        """Of the picture."""
        return str(EXAMPLES / self.file)


@dataclass(frozen=True)
class Examples:
    """For a model: the examples that are shown, and those to play with."""

    shown: list[Example]
    played: list[Example]

    @property
    def opening(self) -> Example:
        """What the page opens with."""
        return next((example for example in self.shown if example.opening), self.shown[0])

    @property
    def measured(self) -> list[Image.Image]:
        """The first MEASURED pictures, whose mean trust is what is usual."""
        paths = dict.fromkeys(example.path for example in [*self.shown, *self.played] if not example.large)
        return [open_picture(path) for path in [*paths][:MEASURED]]

    def __getitem__(self, number: int) -> Example:
        """The example of a number: first those that are shown."""
        return [*self.shown, *self.played][number]

    def number_of(self, turn: dict) -> int | None:
        """The number of the example that a turn of the chat asks about, if it does."""
        asked = [Path(path).name for path in pictures_of(turn)], text_of(turn)
        everything = enumerate([*self.shown, *self.played])
        return next((number for number, one in everything if ([one.file], one.question) == asked), None)

    def picture_of(self, turn: dict) -> int | None:
        """The number of an example with the picture that a turn of the chat asks about, whatever it asks."""
        asked = [Path(path).name for path in pictures_of(turn)]
        everything = enumerate([*self.shown, *self.played])
        return next((number for number, one in everything if [one.file] == asked), None)

    def suggestions(self, note: Note | None) -> list[dict[str, str]]:
        """Buttons beside a note, each with a `value` and a `label`: its questions or, where it has none, the numbers of
        examples to ask about.
        """
        if not note or note.questions:
            return [{"value": one, "label": one} for one in (note.questions if note else [])]
        shown = enumerate(self.shown[:SUGGESTED])
        return [{"value": str(number), "label": f"About a scene: {one.question}"} for number, one in shown]

    def suggested(self, value: Any) -> "Example | None":
        """The example whose number is a button's value, if it is one."""
        numbered = {str(number): one for number, one in enumerate(self.shown)}
        return numbered.get(str(value))

    def verdict(self, number: int | None, answer: str) -> dict[str, Any] | None:
        """The truth about an example, and whether an answer says it; None if it is not known."""
        truth = None if number is None else self[number].truth
        return None if truth is None else {"truth": truth, "right": is_right(answer, truth)}


def read_examples() -> dict[str, Any]:
    """Notes on models' abilities by model name, example scenes of all models, and of some by name."""
    return json.loads((EXAMPLES / "examples.json").read_text())


def examples_for(name: str) -> Examples:
    """For the model of a name. One that has no note puts its answers in words of its own, which are not marked."""
    about = read_examples()
    own = about["scenes_of"].get(name)
    shown = [Example(**scene) for scene in own or about["scenes"]]
    shown += [] if own else [Example(**scene, large=True) for scene in about["large"]]
    if name not in about["models"]:
        return Examples([replace(example, truth=None) for example in shown], [])
    played = [
        Example(scene["file"], question, truth=truth)
        for scene in ([] if own else json.loads((EXAMPLES / "played.json").read_text()))
        for question, truth in scene["asked"]
    ]
    return Examples(shown, played)


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is the truth, in any order of its parts; to yes or no, it may go on after a comma."""
    said, true = ([part.strip() for part in text.lower().strip(" .").split(",")] for text in (answer, truth))
    return sorted(said) == sorted(true) or (truth in ("yes", "no") and said[0] == truth)
