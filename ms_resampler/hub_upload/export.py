"""`ms-resampler export`: a checkpoint and its code in one folder, which loads anywhere."""

import argparse
from pathlib import Path

from ..folders import model_or_embedded
from .staging import stage_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `export`."""
    parser.add_argument("folder", type=Path, help="where to put it: a new folder")
    parser.add_argument("--model", help="checkpoint folder (default: the embedded checkpoint)")


def run(arguments: argparse.Namespace) -> int:
    """Copies the checkpoint and prints how to load it."""
    stage_checkpoint(Path(model_or_embedded(arguments.model)), arguments.folder)
    print(f'AutoModelForImageTextToText.from_pretrained("{arguments.folder}", trust_remote_code=True)')
    return 0
