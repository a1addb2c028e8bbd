"""Personal data (paths, host names, e-mail addresses): removed from published JSON files, reported in others."""

import json
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .secrets import texts_of

HOST = socket.gethostname()
PLACES = r"(?:/home/|/Users/|/root/|\b[A-Za-z]:\\{1,2}Users\\{1,2})"
PERSONAL = {
    "a home folder": rf"{PLACES}[\w.-]",
    "an e-mail address": r"(?<=[\w.+-])@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}\b",
    "a host name": r"(?<=[\w-])\.(?:internal|intranet|corp|lan|local|localdomain)\b"
    + (rf"|\b{re.escape(HOST)}\b" if len(HOST) > 3 and re.search(r"[\d.-]", HOST) else ""),
}
ABSOLUTE = re.compile(r"(?:~|[A-Za-z]:)?[/\\](?:[^/\\\n]+[/\\]+)*?([^/\\\n]+)[/\\]*")
INSIDE = re.compile(rf"(?:{PLACES}|~/)[^\s\"',;]*?([^/\\\s\"',;]+)(?=[\s\"',;]|$)")
OWNER = re.compile(r"(?:host|hostname|node|user|username|e-?mail)", re.IGNORECASE)
# Texts that a model reads are kept unchanged.
MODEL_TEXT = re.compile(r"chat_template|added_tokens.*|.*_tokens?|.*_tokens_map")


def clean_json(file: Path, *, record: bool = False) -> None:
    """Removes folders, host names and e-mail addresses from a JSON file: "/home/ada/data/a.json" becomes "a.json".

    In a training `record` every path is shortened, and the names of user and host are hidden; in other files, texts
    that the model reads are kept.
    """
    before = read_json(file)
    after = cleaned(before, record)
    if after != before:
        file.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """The value of a JSON file. Raises ValueError if it is not JSON."""
    try:
        return load_json(file)
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged ({error}): save the checkpoint again.") from error


def load_json(file: Path) -> Any:
    """As `read_json`, with only the reason in its errors; refuses more than 100 nested levels."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("too many levels") from error
    level: list[Any] = [[value]]
    depth = 0
    while level and depth <= 100:
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level, depth = [child for child in children if isinstance(child, dict | list)], depth + 1
    if level:
        raise ValueError("too many levels")
    return value


def cleaned(value: Any, record: bool) -> Any:
    """A value of a JSON file without personal data."""
    if isinstance(value, list):
        return [cleaned(item, record) for item in value]
    if isinstance(value, dict) and record:
        hidden = {key: "[hidden]" for key, item in value.items() if isinstance(item, str) and OWNER.fullmatch(key)}
        return {cleaned(key, record): cleaned(item, record) for key, item in (value | hidden).items()}
    if isinstance(value, dict):
        return {key: item if MODEL_TEXT.fullmatch(key) else cleaned(item, record) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    if (path := ABSOLUTE.fullmatch(value)) and (record or re.search(r".[/\\].", value)):
        return path[1]
    value = re.sub(rf"[\w.+-]{{1,64}}{PERSONAL['an e-mail address']}", "[e-mail]", INSIDE.sub(r"\1", value))
    return re.sub(rf"[\w.-]{{0,64}}(?:{PERSONAL['a host name']})", "[host]", value)


def personal_notes(files: Iterable[Path]) -> Iterator[str]:
    """The places of personal data in files: "README.md, line 3: an e-mail address"."""
    for file in files:
        for text in texts_of(file):
            for kind, pattern in PERSONAL.items():
                if found := re.search(pattern.encode(), text):
                    line = text.count(b"\n", 0, found.start()) + 1
                    yield f"{file.name}, line {line}: {kind}"
