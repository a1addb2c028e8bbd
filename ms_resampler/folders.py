"""Files and folders that are there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which has its name only when all is written. Raises ValueError if there is one."""
    if out.exists():
        raise ValueError(f"{out} is there already: give a new folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp keeps others out
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of another only when all is written."""
    fresh = path.with_name(f"{path.name}.new")
    yield fresh
    fresh.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text to a file."""
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file, into a folder that is made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as fresh:
        shutil.copyfile(source, fresh)
