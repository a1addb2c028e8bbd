"""Argument types that several commands share."""

import argparse
import json
from typing import Any


def count_or_grid(text: str) -> int | tuple[int, int]:
    """A count or a grid: "36" -> 36, "4x9" -> (4, 9)."""
    rows, by, columns = text.partition("x")
    try:
        return (int(rows), int(columns)) if by else int(rows)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count such as 36 nor a grid such as 4x9") from None


def budget(text: str) -> int | str | tuple[int, int]:
    """Visual tokens of a picture: a count, a grid, or "auto"."""
    return text if text == "auto" else count_or_grid(text)


def add_tiles_argument(parser: Any) -> None:
    """Declares --tiles."""
    parser.add_argument(
        "--tiles",
        type=count_or_grid,
        metavar="N",
        help="cut pictures into tiles of the tower's size: at most a number such as 9, or a grid such as 2x3",
    )


def assignment(text: str) -> tuple[str, Any]:
    """A field and its value: "hidden_size=512" -> ("hidden_size", 512); a value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def count_or_share(text: str) -> int | float:
    """A count or a share of visual tokens: "64" -> 64, "0.25" -> 0.25."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count such as 64 nor a share such as 0.25") from None


def add_reducer_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --reducer, --keep and --reducer-option."""
    parser.add_argument("--reducer", metavar="NAME", help="drop visual tokens by a method of docs/reducers.md")
    parser.add_argument(
        "--keep", type=count_or_share, metavar="N", help="how many a picture keeps: a count such as 64, or a share"
    )
    parser.add_argument(
        "--reducer-option",
        action="append",
        default=[],
        type=assignment,
        metavar="NAME=VALUE",
        help="a setting of the method, such as layer=3 or counts=[60,30,17]; repeatable",
    )


def reducer_of(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The reducer's settings. Raises ValueError for settings without --reducer, or given twice."""
    if arguments.reducer is None:
        if arguments.keep is not None or arguments.reducer_option:
            option = "--reducer-option" if arguments.keep is None else "--keep"
            raise ValueError(f"{option} needs --reducer: the name of a method of docs/reducers.md.")
        return None
    fields = {"reducer_type": arguments.reducer} | ({} if arguments.keep is None else {"keep": arguments.keep})
    for name, value in arguments.reducer_option:
        if name in fields:
            raise ValueError(f"`{name}` of the reducer is given twice: leave out --reducer-option {name}=...")
        fields[name] = value
    return fields
