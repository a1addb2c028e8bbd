"""What a checkpoint knows of pictures and words, and how it scored, from the files beside its weights."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import cached_file

NEIGHBOURS = 5
ENDINGS = ("", "s", "es", "d", "ed", "n", "ing")  # of words that are known with them if they are without
SHORTENED = re.compile(r"(?:n['’]t|['’](?:s|re|d|ll|m|ve))\b")
WORDS_NAMED = 3
SUGGESTED = 3  # questions beside a note


@dataclass(frozen=True)
class Known:
    """What the training had, and from where on something is foreign to it.

    A picture is foreign if its features are farther than `distance` from those in `tensors`, a question if more than
    `unknown_share` of its words are not in `words`. `questions` can be answered about any picture of the training.
    """

    tensors: dict[str, torch.Tensor]
    distance: float
    words: frozenset[str]
    unknown_share: float
    questions: list[str]

    def is_foreign(self, states_CHW: torch.Tensor) -> bool:
        """Whether a picture, as the tower's last map shows it, is unlike those of the training."""
        states = states_CHW.float().cpu()
        features = torch.cat([states.mean(dim=(1, 2)), states.std(dim=(1, 2))])
        away = (features - self.tensors["mean"]) / self.tensors["std"] - self.tensors["features"].float()
        return away.norm(dim=-1).topk(NEIGHBOURS, largest=False).values.mean().item() > self.distance

    def foreign_words(self, question: str) -> list[str]:
        """The unknown words of a question's longest sentence, without what leads in to it; empty if they are few."""
        asked = SHORTENED.sub("", question.rpartition(":")[2] if re.search(r":.*\w", question) else question)
        words = max(reversed([re.findall(r"\w+", sentence) for sentence in re.split(r"[.!?]", asked)]), key=len)
        unknown = [word for word in words if not self.knows(word.lower())]
        return list(dict.fromkeys(unknown)) if len(unknown) > self.unknown_share * len(words) else []

    def knows(self, word: str) -> bool:
        """Whether a word, or what it is a form of, was in the training."""
        return any(word.removesuffix(end) in self.words for end in ENDINGS)


def read_record(model_id: str, revision: str | None) -> tuple[Known | None, list[dict[str, Any]]]:
    """What the model of a folder or a Hub repository knows, and its scores by number of visual tokens, if it tells."""
    record = file_of(model_id, "training_record.json", revision)
    told = json.loads(Path(record).read_text(encoding="utf-8")) if record else {}
    features, entry = file_of(model_id, "known_inputs.safetensors", revision), told.get("known_inputs")
    known = None
    if features and entry:
        words = frozenset(entry["words"].split())
        known = Known(load_file(features), entry["distance"], words, entry["unknown_share"], entry["questions"])
    return known, told.get("budget_scores", [])


def file_of(model_id: str, name: str, revision: str | None) -> str | None:
    """The path of a file of a folder or a Hub repository, if it is there."""
    return cached_file(
        model_id,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


@dataclass(frozen=True)
class Note:
    """What is foreign to the model, in a sentence, and questions about these pictures that it can answer instead."""

    sentence: str
    questions: list[str]


def note_for(known: Known | None, question: str, foreign: Sequence[bool]) -> Note | None:
    """The note on an answer to a question about pictures, some of which may be foreign; None if nothing is."""
    words = known.foreign_words(question) if known else []
    sentence = note_on(foreign, words)
    if not known or not sentence:
        return None
    return Note(sentence, [] if any(foreign) else known.questions[:SUGGESTED])


def note_on(foreign: Sequence[bool], words: Sequence[str]) -> str:
    """What to say of pictures, some of which may be foreign, and of a question's foreign words; empty if of nothing."""
    said = []
    if any(foreign):
        which = "This picture is" if len(foreign) == 1 else "One of these pictures is"
        if sum(foreign) > 1:
            which = "Some of these pictures are"
        said.append(f"{which} unlike those that the model was trained on, so the answer may be wrong.")
    if words:
        said.append(f"The model has not learned {quoted(words)}.")
    return " ".join(said)


def quoted(words: Sequence[str]) -> str:
    """The first words: ["capital", "France"] -> 'the words “capital” and “France”'."""
    *first, last = (f"“{word}”" for word in words[:WORDS_NAMED])
    return f"the words {', '.join(first)} and {last}" if first else f"the word {last}"
