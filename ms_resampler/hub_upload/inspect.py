"""What a file holds: links, pickles, damaged and oversized files are found before they leave this machine."""

import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
# A pickle of protocol 2 to 5, and the archive in which torch.save puts one.
PICKLE_BYTES = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")

MEGABYTE, GIGABYTE = 10**6, 10**9
# The Hub refuses files over 50 GB; everything but weights is small.
LIMITS = {"*.safetensors": 50 * GIGABYTE, "tokenizer.*": 100 * MEGABYTE, "*": 10 * MEGABYTE}


def check_folder(folder: Path, allowed: Iterable[Path]) -> None:
    """Raises ValueError, naming the files, if anything in the folder's top level speaks against publishing `allowed`.

    Pickles and links are refused even if they would not be published: they are not what the publisher thinks is there.
    """
    here, allowed = sorted(folder.iterdir()), list(allowed)
    files = [file for file in here if file.is_file()]
    refuse([file for file in here if file.is_symlink()], "a link to another place: put the file itself there")
    pickled = [file for file in files if file.suffix in PICKLE_SUFFIXES or (file in allowed and is_pickle(file))]
    refuse(pickled, "a pickle, which can run code where it is opened: save weights as safetensors, or remove it")
    refuse([file for file in allowed if file.stat().st_size == 0], "empty: save the checkpoint again")
    for file in allowed:
        check_content(file)


def check_sizes(files: Iterable[Path]) -> None:
    """Raises ValueError, naming them, if there are files that are too large to publish."""
    large = [file for file in files if file.stat().st_size > limit_of(file)]
    refuse(large, "too large; weights can be split with --max-shard-size 5GB")


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
    """Raises ValueError if a file is not what its name says."""
    check = CONTENT_CHECKS.get(file.suffix)
    if check is None:
        return
    try:
        check(file)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"Nothing was sent. {file.name} is damaged ({error}): save the checkpoint again.") from error


def check_weights(file: Path) -> None:
    """Raises SafetensorError unless the header describes exactly the bytes that follow it."""
    with safe_open(file, "pt"):
        pass


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
