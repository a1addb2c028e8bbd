"""Checks the content of files: pickles, damage, size, secrets, and the code that a configuration refers to."""

import pickletools
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from ..progress import progress
from .personal import load_json
from .secrets import PICTURES, find_secret, holds_token, texts_of
from .staging import allowed_files

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
# First bytes of pickles from protocol 2 on, of archives that may hold older ones, and of NumPy and HDF5.
PICKLE_BYTES = re.compile(
    rb"\x80[\x00-\x05]|\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18|\x78[\x01\x9c\xda]|\x93NUMPY|\x89HDF"
)
IMPORTS, CALLS = {"GLOBAL", "INST", "STACK_GLOBAL"}, {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}

MEGABYTE, GIGABYTE = 10**6, 10**9
# The Hub refuses files over 50 GB; everything but weights is small.
LIMITS = {"*.safetensors": 50 * GIGABYTE, "tokenizer.*": 100 * MEGABYTE, "*": 10 * MEGABYTE}


def inspect_source(folder: Path) -> None:
    """Raises ValueError, naming the files, if a folder holds links or pickles.

    They are refused even if they would not be published, because the publisher may not know of them.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    here = sorted(folder.iterdir())
    linked = [file for file in allowed_files(folder) if file.stat().st_nlink > 1]
    refuse_links(here)
    refuse(linked, "a hard link, the same file under another name: put a copy of it there")
    pickled = [file for file in here if file.suffix in PICKLE_SUFFIXES]
    refuse(pickled, "a pickle, which can run code where it is opened: save weights as safetensors, or remove it")
    refuse([file for file in allowed_files(folder) if file.stat().st_size == 0], "empty: save the checkpoint again")


def refuse_links(files: Iterable[Path]) -> None:
    """Raises ValueError, naming them, if any of the files is a link."""
    refuse([file for file in files if file.is_symlink()], "a link to another place: put the file itself there")


def inspect_files(files: Iterable[Path]) -> None:
    """Raises ValueError, naming the file, unless each is small enough, matches its name, and has no secrets."""
    files = sorted(files)
    refuse([file for file in files if is_pickle(file)], "a pickle or an archive, which can run code where it is opened")
    large = [file for file in files if file.stat().st_size > limit_of(file)]
    refuse(large, "too large; weights can be split with --max-shard-size 5GB")
    total = sum(file.stat().st_size for file in files)
    with progress(total=total, desc="Looking for secrets", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for file in files:
            try:
                check_content(file)
            except ValueError as error:
                reason = f"{file.name} is damaged ({error}): save the checkpoint again."
                raise ValueError(f"Nothing was sent. {reason}") from error
            check_secrets(file, bar.update)


def refuse(files: list[Path], reason: str) -> None:
    """Raises ValueError if there are files to refuse."""
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"Nothing was sent. {names}: {reason}.")


def limit_of(file: Path) -> int:
    """The largest size in bytes that a file of this name may have."""
    return next(limit for pattern, limit in LIMITS.items() if fnmatch(file.name, pattern))


# Pickles


def is_pickle(file: Path) -> bool:
    """Whether a file is a pickle of any protocol, or an archive, which can hold one.

    Weights are left to `check_content`, because their first bytes, a length, may look like a pickle.
    """
    with file.open("rb") as opened:
        start = opened.read(16)
    if file.suffix == ".safetensors" and start[8:9] == b"{":
        return False
    archive = PICKLE_BYTES.match(start) or zipfile.is_zipfile(file) or tarfile.is_tarfile(file)
    return bool(archive) or is_old_pickle(file)


def is_old_pickle(file: Path) -> bool:
    """Whether a file is a pickle of protocol 0 or 1, which have no signature: its opcodes are read, not executed.

    It is one if it calls something that it imports, or if it ends where the file ends.
    """
    imports = steps = 0
    size = file.stat().st_size
    with file.open("rb") as opened:
        try:
            for steps, (step, argument, _) in enumerate(pickletools.genops(opened), start=1):
                if step.name in IMPORTS and re.fullmatch(r"[\w.]+ [\w.]+", str(argument or "a b")):
                    imports = imports or steps
                if step.name in CALLS and imports and (steps > imports + 1 or step.name == "INST"):
                    return True
        except (ValueError, OverflowError):
            return False
        return steps > 1 and opened.tell() == size


# Contents


def check_content(file: Path) -> None:
    """Raises ValueError, with only the reason, if a file does not match its name."""
    CONTENT_CHECKS.get(file.suffix, read_text)(file)


def read_text(file: Path) -> str:
    """The text of a file. Raises ValueError if it is not text."""
    text = file.read_text(encoding="utf-8")
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        raise ValueError("not a text: it has control characters")
    return text


def check_model(file: Path) -> None:
    """Raises ValueError unless a file is a SentencePiece model or text."""
    if not file.read_bytes().startswith(b"\n"):
        read_text(file)


def check_weights(file: Path) -> None:
    """Raises ValueError unless the header matches the bytes that follow it, and the numbers are finite."""
    try:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = weights.get_tensor(name)
                tensor = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
                # Only the sigma of a global scope may be infinite.
                if tensor.isnan().any() or (tensor.isinf().any() and "sigma" not in name):
                    raise ValueError(f"{name} has numbers that are not finite")
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def check_picture(file: Path) -> None:
    """Raises ValueError unless a file is a picture of the type of its suffix, with nothing after a PNG."""
    kind = Image.registered_extensions()[file.suffix]
    try:
        with Image.open(file, formats=[kind]) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"no {kind} picture") from error
    if kind == "PNG" and not file.read_bytes().endswith(b"\0\0\0\0IEND\xae\x42\x60\x82"):
        raise ValueError("something follows the picture")


CONTENT_CHECKS: dict[str, Callable[[Path], object]] = {
    ".safetensors": check_weights,
    ".json": load_json,
    ".model": check_model,
    **dict.fromkeys(PICTURES, check_picture),
}


# Secrets


def check_secrets(file: Path, progress: Callable[[int], object] = lambda size: None) -> None:
    """Raises ValueError, without quoting it, if a file or its name contains something that looks like a secret."""
    if find_secret(file.name.encode()):
        raise ValueError(f"Nothing was sent. The name of a {file.suffix} file looks like a secret: change it.")
    readable = next(filter(None, map(find_secret, texts_of(file))), None)
    if found := readable or holds_token(file, progress=progress):
        kind, line = found
        if kind == "Hugging Face token":
            raise ValueError(f"Nothing was sent. {file.name} holds a {kind}: remove it, and revoke it.")
        where = f"{file.name}, line {line}," if line else file.name
        raise ValueError(f"Nothing was sent. {where} looks like a secret ({kind}): remove it, and revoke it.")
