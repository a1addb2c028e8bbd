"""Chat messages of text, images and clips in the formats of transformers and OpenAI; anything else is refused.

{"type": "image_url", "image_url": {"url": URL}}  ->  {"type": "image", "url": URL}
{"type": "input_text", "text": "Hi"}              ->  {"type": "text", "text": "Hi"}
"""

import re
from collections.abc import Mapping
from typing import Any

# Inserted into an image token that a person has typed, and dropped by the tokenizer's normaliser, so that the token
# becomes ordinary text. Unicode reserves this code point for such internal marks, so no text contains it.
TYPED = "\ufdd0"
VIDEO_TOKEN = "<video>"  # the placeholder of a clip, which becomes image tokens
SOURCES = ("image", "image_url", "url", "path", "base64")


def understood_messages(conversation: Any, template: str, image_token: str) -> list[dict[str, Any]]:
    """The messages with parts `text`, `image` and `video` only; tokens of images and clips in texts stay text.

    Raises ValueError, with the number of the message, for an unknown part, key or format.
    """
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ValueError("A conversation is a list of messages, each a dict with `role` and `content`.")
    return [_message(message, number, template, image_token) for number, message in enumerate(conversation, start=1)]


def as_typed(value: Any, image_token: str) -> Any:
    """A string, or the strings in lists and dicts, with every token of an image or a clip marked as typed text."""
    if isinstance(value, str):
        for token in (image_token, VIDEO_TOKEN):
            value = value.replace(token, token[0] + TYPED + token[1:])
        return value
    if isinstance(value, Mapping):
        return {key: as_typed(item, image_token) for key, item in value.items()}
    return [as_typed(item, image_token) for item in value] if isinstance(value, (list, tuple)) else value


def _message(message: Any, number: int, template: str, image_token: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"Message {number} is no dict with a `role`, such as 'user', and `content`.")
    given = {key: value for key, value in message.items() if key == "content" or value not in (None, [], {}, "")}
    for key in given:
        read_as = "tool" if key == "tool_call_id" else key  # templates identify tool results by their order
        if key not in ("role", "content") and not re.search(rf"[.'\"]{re.escape(read_as)}\b", template):
            raise ValueError(f"Message {number} has `{key}`, which the chat template does not read; leave it out.")
    content = given.pop("content", None)
    if content is None and len(given) == 1:
        raise ValueError(f"Message {number} has no content.")
    given = as_typed(given, image_token)
    if content is None:
        return given
    if isinstance(content, str):
        return given | {"content": as_typed(content, image_token)}
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"The content of message {number} is text or a list of parts, got {type(content).__name__}.")
    return given | {"content": _keep_typed([_part(part, f"Message {number}") for part in content], image_token)}


def _part(part: Any, where: str) -> dict[str, Any]:
    """A part of a message as `text`, `image` or `video`."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} has a part that is no dict with a `type`, but {type(part).__name__}.")
    rest = {key: value for key, value in part.items() if value is not None}  # rows of tables have all keys in all parts
    kind = rest.pop("type", None)
    if kind in ("text", "input_text", "output_text"):
        result = {"type": "text", "text": rest.pop("text", None)}
        if not isinstance(result["text"], str):
            raise ValueError(f"{where} has a part {kind!r} without a text.")
    elif kind in ("image", "image_url", "input_image"):
        rest.pop("detail", None)  # OpenAI's resolution hint ("auto", "low" or "high"); here the budget decides
        sources = {key: rest.pop(key) for key in SOURCES if key in rest}
        if len(sources) > 1 or (kind != "image" and "image_url" not in sources):
            raise ValueError(
                f"{where} has a part {kind!r} with {len(sources)} images ({', '.join(sources)}); give one."
            )
        result = {"type": "image", **sources}
        if "image_url" in sources:
            url = result.pop("image_url")
            if isinstance(url, Mapping):
                rest |= {f"image_url.{key}": value for key, value in url.items() if key not in ("url", "detail")}
                url = url.get("url")
            if not isinstance(url, str):
                raise ValueError(f"{where} has a part {kind!r} without a URL.")
            result["url"] = url
    elif kind == "video":
        sources = {key: rest.pop(key) for key in ("video", "url", "path") if key in rest}
        if len(sources) > 1:
            raise ValueError(f"{where} has a part 'video' with {len(sources)} clips ({', '.join(sources)}); give one.")
        result = {"type": "video", "video": next(iter(sources.values()), None)}
    else:
        raise ValueError(
            f"{where} has a part of type {kind!r}, which is not understood; parts are `text`, `image` and `video`, or "
            "OpenAI's `image_url`, `input_image` and `input_text`."
        )
    if rest:
        raise ValueError(f"{where} has a part {kind!r} with `{next(iter(rest))}`, which is not understood.")
    return result


def _keep_typed(parts: list[dict[str, Any]], image_token: str) -> list[dict[str, Any]]:
    """The parts with typed tokens of images and clips marked, also a token that is split between two texts."""
    kept, run = [], ""
    for part in parts:
        if part["type"] != "text":
            kept.append(part)
            run = ""
            continue
        text = part["text"]
        goes_on = any((run + text).count(t) > run.count(t) + text.count(t) for t in (image_token, VIDEO_TOKEN))
        kept.append({"type": "text", "text": TYPED * goes_on + as_typed(text, image_token)})
        run += text
    return kept
