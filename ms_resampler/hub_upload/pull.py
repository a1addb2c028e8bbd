"""`ms-resampler pull`: downloads a checkpoint, and keeps it if it is what it should be."""

import argparse
import shutil
from pathlib import Path

from .check import download_checked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `pull`."""
    parser.add_argument("repository", metavar="ORG/NAME[@REVISION]", help="what to download (default revision: main)")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="a new folder (default: NAME)")


def run(arguments: argparse.Namespace) -> int:
    """Downloads beside the folder, going on where a killed download stopped, and renames at the end."""
    name = arguments.repository.partition("@")[0].rpartition("/")[2]
    folder = arguments.folder or Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder.")
    partial = folder.with_name(f"{folder.name}.partial")
    download_checked(arguments.repository, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's notes on what it has fetched
    partial.replace(folder)
    print(f"It is in {folder}.")
    return 0
