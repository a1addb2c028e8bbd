"""Converts the chat between Gradio's form, kept in the browser, and that of the processor.

Gradio shows the texts of a chat as HTML: they are escaped there, and nowhere else.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from html import escape, unescape
from typing import Any

from pictures import Refusal, check_count, open_picture
from PIL import Image

MAX_QUESTION_CHARACTERS = 500
PENDING = "…"  # shown for an answer that has no words yet, or was stopped before the first


def user_turn(text: str | None, files: list[str] | None, history: list[dict]) -> dict:
    """A question with its pictures, as turns of the chat. Raises Refusal if it cannot be asked."""
    files = files or []
    check_count(files, has_earlier_picture=any(pictures_of(turn) for turn in history))
    return turn_of("user", check_question(text), files)


def check_question(text: str | None) -> str:
    """The question, trimmed. Raises Refusal if it is empty or too long."""
    question = (text or "").strip()
    if not question:
        raise Refusal("Please type a question about the picture.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise Refusal(f"The question has {len(question)} characters; please ask in at most {MAX_QUESTION_CHARACTERS}.")
    return question


def assistant_turn(text: str, note: str = "", buttons: Iterable[dict[str, str]] = ()) -> dict:
    """An answer, possibly partial, with a note on it and buttons below, each with a `value` and a `label`."""
    return turn_of("assistant", text or PENDING, note=note) | {"options": list(buttons)}


def turn_of(role: str, text: str, files: Iterable[str] = (), note: str = "") -> dict:
    """A turn of the chat, in Gradio's form; a note is a second text."""
    pictures = [{"path": path, "alt_text": "The picture asked about"} for path in files]
    texts = [text, note] if note else [text]
    return {"role": role, "content": [*pictures, *({"type": "text", "text": escape(t, quote=False)} for t in texts)]}


def as_sent(history: list[dict]) -> list[dict]:
    """The chat without the addresses of its pictures, which Gradio would take for their paths the next time."""
    return [turn_of(turn["role"], text_of(turn), pictures_of(turn), note_of(turn)) for turn in history]


def pictures_of(turn: dict) -> list[str]:
    """The paths of the pictures in a turn, as this app or Gradio writes them."""
    content = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
    parts = [part.get("file", part) for part in content if isinstance(part, dict)]
    return [part["path"] for part in parts if "path" in part]


def texts_of(turn: dict) -> list[str]:
    """The texts of a turn: its words, and a note on them if there is one."""
    content = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
    texts = [part if isinstance(part, str) else part.get("text", "") for part in content]
    return [unescape(text) for text in texts if text]


def text_of(turn: dict) -> str:
    """The words of a turn."""
    return "".join(texts_of(turn)[:1])


def note_of(turn: dict) -> str:
    """The note on an answer."""
    return "".join(texts_of(turn)[1:])


def said_in(turn: dict) -> str:
    """The words of a turn for the model, without the placeholder of an empty answer."""
    text = text_of(turn)
    return "" if turn["role"] == "assistant" and text == PENDING else text


def last_question(history: list[dict]) -> int:
    """The index of the last question in the chat."""
    return max(place for place, turn in enumerate(history) if turn["role"] == "user")


def answers_in(history: list[dict]) -> list[int]:
    """The indices of the answers in the chat."""
    return [place for place, turn in enumerate(history) if turn["role"] == "assistant"]


def topic(history: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """The turns since the last question with pictures, in the processor's form, and those pictures.

    A question with pictures begins a new topic; an answer that was stopped before its first word is empty.
    Raises Refusal if none of the questions has a picture.
    """
    starts = [place for place, turn in enumerate(history) if pictures_of(turn)]
    if not starts:
        check_count([])
    paths = pictures_of(history[starts[-1]])
    check_count(paths)
    for path in paths:
        with suppress(OSError):  # a missing one is told of when it is opened
            os.utime(path)  # uploads are deleted some time after their last use
    pictures = [open_picture(path) for path in paths]
    turns: list[dict[str, Any]] = [
        {"role": turn["role"], "content": [{"type": "text", "text": said_in(turn)}]} for turn in history[starts[-1] :]
    ]
    turns[0]["content"][:0] = [{"type": "image", "image": picture} for picture in pictures]
    return turns, pictures
