r"""Converts records of common formats to chat messages and images; anything else is refused.

LLaVA's turns, in which `<image>` marks where an image goes:

    {"id": ..., "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, ...]}

Chat messages, whose image parts hold an image or refer to the next of `images`; `<image>` in a text is plain text:

    {"id": ..., "images": ["a.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, ...]}, ...]}

An image is a path, a URL, a data: URI, base64, bytes or, from Python, a PIL image or an array.
"""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from ..messages_ms_resampler import SOURCES, understood_messages

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ROLES |= {"developer": "system"}  # OpenAI's name for it
# Common fields that would be dropped: other names of images, and data that is not trained on.
NOT_READ = {
    **dict.fromkeys(("image_url", "image_urls", "image_path", "image_paths", "image_file", "img", "imgs"), "`images`"),
    **dict.fromkeys(("picture", "pictures", "image_bytes", "image_base64"), "`images`"),
    **dict.fromkeys(("video", "videos", "audio", "audios", "tools", "tool_calls", "functions", "documents"), ""),
}
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{64,}={0,2}\s*")
NAME_LENGTH = 80  # of a record's id in messages


class BadRecord(ValueError):
    """A record that cannot be trained on; `kind` is the reason in a word or two, the message in a sentence."""

    def __init__(self, kind: str, record: dict[str, Any], why: str):
        super().__init__(f"Record {name_of(record)} {printable(why)}")
        self.kind = kind


@dataclass(frozen=True)
class Conversation:
    """Messages with the parts `text` and `image`, and the image source of each part `image`, in order."""

    messages: list[dict[str, Any]]
    images: list[Any]


@contextmanager
def naming(record: dict[str, Any]) -> Iterator[None]:
    """Turns any error of a library about a record into a BadRecord."""
    try:
        yield
    except BadRecord:
        raise
    except Exception as error:
        why = f"cannot be read: {type(error).__name__}: {error}"
        raise BadRecord("unreadable record", record, why[:500]) from error


def conversation_of(record: dict[str, Any], image_token: str = "<image>") -> Conversation:
    """A record's messages and images. Raises BadRecord for an unknown format, or if images and placeholders differ.

    `record["folder"]`, if given, is the folder that paths are relative to and must stay in. The model's `image_token`
    typed in a text is marked as text.
    """
    with naming(record):
        messages = messages_in(record, image_token)
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        waiting = images_in(record)
        own = [next((part[source] for source in SOURCES if source in part), None) for part in parts]
        if sum(image is None for image in own) != len(waiting):
            marks = "parts of type image without a source" if "messages" in record else "<image> placeholders"
            why = f"has {sum(image is None for image in own)} {marks}, but {len(waiting)} images."
            raise BadRecord("image count", record, why)
        given = iter(waiting)
        images = [located(next(given) if image is None else image, record) for image in own]
        for message in messages:
            message["content"] = [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]
        return Conversation(messages, images)


def messages_in(record: dict[str, Any], image_token: str = "<image>") -> list[dict[str, Any]]:
    """A record's messages, whose image parts may hold an image. Raises BadRecord."""
    if isinstance(record.get("problem"), BadRecord):
        raise record["problem"]
    for name, instead in NOT_READ.items():
        if not is_empty(record.get(name)):
            advice = f"call it {instead}" if instead else "leave it out, or the record"
            raise BadRecord("not understood", record, f"has `{name}`, which is not read: {advice}.")
    forms = [name for name in ("conversations", "messages") if not is_empty(record.get(name))]
    if len(forms) != 1:
        why = "has both `conversations` and `messages`: keep one." if forms else "has no `conversations` or `messages`."
        raise BadRecord("no conversation", record, why)
    said = record[forms[0]]
    if not isinstance(said, (list, tuple)):
        raise BadRecord("no conversation", record, f"has no list in `{forms[0]}`.")
    messages = turns_as_messages(record, said) if forms == ["conversations"] else list(said)
    if not is_empty(system := record.get("system")):
        messages.insert(0, {"role": "system", "content": system})
    try:
        messages = understood_messages(messages, "", image_token)
    except ValueError as error:
        raise BadRecord("not understood", record, f"is not understood: {error}") from error
    for number, message in enumerate(messages, start=1):
        if (role := message["role"]) not in ROLES:
            known = ", ".join(ROLES)
            raise BadRecord("unknown role", record, f"has a turn {number} of {role!r}; known are {known}.")
        message["role"] = ROLES[role]
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        for part in message["content"]:
            if part["type"] == "video":
                why = f"Message {number} has a part of type 'video', and clips are not trained on."
                raise BadRecord("not understood", record, f"is not understood: {why}")
            if "text" in part:
                part["text"] = checked(record, part["text"].replace("\r\n", "\n").replace("\r", "\n"))
        check_answer(record, message, number)
    return messages


def turns_as_messages(record: dict[str, Any], turns: list[Any] | tuple[Any, ...]) -> list[dict[str, Any]]:
    r"""LLaVA's turns as messages: "<image>\nWhat?" -> [{"type": "image"}, {"type": "text", "text": "What?"}]."""
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRecord("malformed turn", record, f"has no text in turn {number}: a turn is `from` and `value`.")
        if others := [key for key, value in turn.items() if key not in ("from", "value") and not is_empty(value)]:
            raise BadRecord("not understood", record, f"has `{others[0]}` in turn {number}, which is not read.")
        content: list[dict[str, str]] = []
        for place, text in enumerate(turn["value"].split("<image>")):
            content += [{"type": "image"}] if place else []
            content += [{"type": "text", "text": text.strip("\r\n")}] if text.strip("\r\n") else []
        messages.append({"role": str(turn.get("from")), "content": content})
    return messages


def check_answer(record: dict[str, Any], message: dict[str, Any], number: int) -> None:
    """Raises BadRecord for an empty answer, or one with an image."""
    if message["role"] != "assistant":
        return
    if any(part["type"] == "image" for part in message["content"]):
        raise BadRecord("image in an answer", record, "has an <image> in an answer, which must be text.")
    if not "".join(part["text"] for part in message["content"]).strip():
        raise BadRecord("empty answer", record, f"has an empty answer in turn {number}.")


def checked(record: dict[str, Any], text: str) -> str:
    """The text. Raises BadRecord if it contains half a character or bytes that were not UTF-8."""
    if found := re.search("[\ud800-\udfff]", text):
        why = (
            f"has a character that is none ({ascii(found[0])[1:-1]}): if its file is not UTF-8, convert it, for "
            "example with `iconv -f LATIN1 -t UTF-8 OLD > NEW`."
        )
        raise BadRecord("damaged text", record, why)
    return text


def images_in(record: dict[str, Any]) -> list[Any]:
    """The images of a record's own fields, as a list."""
    found = [record[name] for name in ("image", "images") if not is_empty(record.get(name))]
    if len(found) > 1:
        raise BadRecord("not understood", record, "has both `image` and `images`: keep one.")
    images = found[0] if found else []
    return [image for image in (images if isinstance(images, (list, tuple)) else [images]) if not is_empty(image)]


def is_empty(value: Any) -> bool:
    """Whether a field is empty: rows of tables have all fields."""
    return value is None or (isinstance(value, (str, list, tuple, dict, bytes)) and not value)


def located(image: Any, record: dict[str, Any]) -> Any:
    """An image source for the processor: a path in the record's folder, a URL, bytes, or an image."""
    if isinstance(image, dict):  # as `datasets` stores one
        stored = {name: value for name, value in image.items() if not is_empty(value)}
        image = next((stored[name] for name in ("bytes", "path", "url") if name in stored), None)
        if image is None or stored.keys() - {"bytes", "path", "url"}:
            raise BadRecord("unreadable image", record, f"has an image with the fields {', '.join(map(str, stored))}.")
    if not isinstance(image, str):
        if image is None or isinstance(image, (bool, int, float, list, tuple)):
            kind = type(image).__name__
            why = f"has an image that is of type {kind}: it is a path, a URL, a data: URI, base64 or bytes."
            raise BadRecord("unreadable image", record, why)
        return image
    if image[:5].lower() == "data:":
        return decoded(image, record)
    scheme, separator, rest = image.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return image
    if separator and scheme.lower() == "file":
        return path_of(unquote("/" + rest.partition("/")[2]), record)
    return path_of(image, record)


def decoded(uri: str, record: dict[str, Any]) -> bytes:
    """The bytes of a data: URI."""
    head, _, data = uri.partition(",")
    try:
        return base64.b64decode("".join(data.split())) if head.endswith(";base64") else unquote_to_bytes(data)
    except ValueError as error:
        raise BadRecord("unreadable image", record, f"has a data: URI that cannot be decoded: {error}.") from error


def path_of(name: str, record: dict[str, Any]) -> Any:
    """A path in the folder of images, or the bytes of base64. Raises BadRecord for a path that leads out of it."""
    folder = Path(record.get("folder", ""))
    bound = os.path.abspath(folder) if "folder" in record else os.sep
    paths = [folder / spelling for spelling in spellings(name, folder)]
    within = [path for path in paths if Path(os.path.abspath(path)).is_relative_to(bound)]
    if found := next(filter(os.path.isfile, within), None):
        return found
    if BASE64.fullmatch(name):
        return base64.b64decode("".join(name.translate(str.maketrans("-_", "+/")).split()) + "==")
    if "://" in name or len(within) < len(paths):
        why = f"names the image {name[:NAME_LENGTH]!r}: a path must stay within the folder of images."
        raise BadRecord("image path", record, why)
    return paths[0]


def spellings(name: str, folder: Path) -> Iterator[str]:
    """A path with slashes, without the end of the folder's path that it may repeat."""
    slashed = name.replace("\\", "/")
    yield name
    yield slashed
    parts, ends = Path(slashed).parts, Path(os.path.abspath(folder)).parts
    for count in range(1, len(parts)):
        if parts[:count] == ends[-count:]:
            yield "/".join(parts[count:])


def messages_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record's messages. Raises BadRecord."""
    return conversation_of(record).messages


def images_of(record: dict[str, Any]) -> list[Any]:
    """A record's images. Raises BadRecord."""
    return conversation_of(record).images


def name_of(record: dict[str, Any]) -> str:
    """A record's id, short and printable."""
    given = record.get("id")
    name = printable(given if isinstance(given, str) else repr(given) if isinstance(given, (int, float)) else "?")
    return name if len(name) <= NAME_LENGTH else f"{name[:NAME_LENGTH]}..."


def printable(text: str) -> str:
    """A text in one line, with unprintable characters escaped."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
