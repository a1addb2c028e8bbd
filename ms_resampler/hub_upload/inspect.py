"""What files hold: links, pickles, damaged or oversized files and secrets are found before they leave this machine."""

import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .secrets import find_secret, holds_token

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
# A pickle of protocol 2 to 5, and the archive in which torch.save puts one.
PICKLE_BYTES = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")

MEGABYTE, GIGABYTE = 10**6, 10**9
# The Hub refuses files over 50 GB; everything but weights is small.
LIMITS = {"*.safetensors": 50 * GIGABYTE, "tokenizer.*": 100 * MEGABYTE, "*": 10 * MEGABYTE}


def inspect_source(folder: Path) -> None:
    """Raises ValueError, naming the files, if a folder holds links or pickles.

    They are refused even if they would not be published: they are not what the publisher thinks is there.
    """
    here = sorted(folder.iterdir())
    refuse_links(here)
    pickled = [file for file in here if file.suffix in PICKLE_SUFFIXES]
    refuse(pickled, "a pickle, which can run code where it is opened: save weights as safetensors, or remove it")


def refuse_links(files: Iterable[Path]) -> None:
    """Raises ValueError, naming them, if there are links among files."""
    refuse([file for file in files if file.is_symlink()], "a link to another place: put the file itself there")


def inspect_files(files: Iterable[Path]) -> None:
    """Raises ValueError, naming the file, unless each is small enough, what its name says, and free of secrets."""
    files = list(files)
    refuse([file for file in files if is_pickle(file)], "a pickle, which can run code where it is opened: remove it")
    refuse([file for file in files if file.stat().st_size == 0], "empty: save the checkpoint again")
    large = [file for file in files if file.stat().st_size > limit_of(file)]
    refuse(large, "too large; weights can be split with --max-shard-size 5GB")
    for file in files:
        try:
            check_content(file)
        except ValueError as error:
            raise ValueError(
                f"Nothing was sent. {file.name} is damaged ({error}): save the checkpoint again."
            ) from error
        check_secrets(file)


def refuse(files: list[Path], reason: str) -> None:
    """Raises ValueError if there are files to refuse."""
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"Nothing was sent. {names}: {reason}.")


def is_pickle(file: Path) -> bool:
    """Whether a file begins as pickles do. Weights are left to `check_content`: their length may begin so, too."""
    with file.open("rb") as opened:
        start = opened.read(16)
    return bool(PICKLE_BYTES.match(start)) and not (file.suffix == ".safetensors" and start[8:9] == b"{")


def limit_of(file: Path) -> int:
    """The largest size in bytes that a file of this name may have."""
    return next(limit for pattern, limit in LIMITS.items() if fnmatch(file.name, pattern))


def check_content(file: Path) -> None:
    """Raises ValueError, with the reason alone, if a file is not what its name says."""
    if check := CONTENT_CHECKS.get(file.suffix):
        check(file)


def check_weights(file: Path) -> None:
    """Raises ValueError unless the header describes exactly the bytes that follow it."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def check_picture(file: Path) -> None:
    """Raises ValueError unless the file begins as PNG files do."""
    with file.open("rb") as opened:
        if opened.read(8) != b"\x89PNG\r\n\x1a\n":
            raise ValueError("no PNG picture")


CONTENT_CHECKS: dict[str, Callable[[Path], object]] = {
    ".safetensors": check_weights,
    ".png": check_picture,
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
    ".md": lambda file: file.read_text(encoding="utf-8"),
    ".jinja": lambda file: file.read_text(encoding="utf-8"),
}


def check_secrets(file: Path) -> None:
    """Raises ValueError, without repeating it, if a file holds something that looks like a secret."""
    found = holds_token(file) if file.suffix == ".safetensors" else find_secret(file.read_bytes())
    if found:
        kind, line = found
        if kind == "Hugging Face token":
            raise ValueError(f"Nothing was sent. {file.name} holds a {kind}: remove it, and revoke it.")
        where = f"{file.name}, line {line}," if line else file.name
        raise ValueError(f"Nothing was sent. {where} looks like a secret ({kind}): remove it, and revoke it.")
