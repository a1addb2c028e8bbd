"""`ms-resampler export`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `export`."""
    parser.add_argument("folder", type=Path, help="new folder for the copy")
    parser.add_argument("--model", help="checkpoint folder (default: the embedded checkpoint)")


def run(arguments: argparse.Namespace) -> int:
    """Copies the checkpoint with its code, and prints how to load it."""
    from ms_resampler.hub_upload.staging import export

    export(arguments.folder, arguments.model)
    print(f'AutoModelForImageTextToText.from_pretrained("{arguments.folder}", trust_remote_code=True)')
    return 0
