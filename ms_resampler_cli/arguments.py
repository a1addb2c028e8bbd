"""Argument types that several commands share."""

import argparse
import json
from typing import Any


def budget(text: str) -> int | tuple[int, int]:
    """A count or a grid of visual tokens: "36" -> 36, "4x9" -> (4, 9)."""
    rows, by, columns = text.partition("x")
    try:
        return (int(rows), int(columns)) if by else int(rows)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count such as 36 nor a grid such as 4x9") from None


def assignment(text: str) -> tuple[str, Any]:
    """A field and its value: "hidden_size=512" -> ("hidden_size", 512); a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
