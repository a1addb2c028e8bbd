"""`ms-resampler pull`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `pull`."""
    parser.add_argument("repository", metavar="ORG/NAME[@REVISION]", help="what to download (default revision: main)")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="a new folder (default: NAME)")
    parser.add_argument("--allow-code", metavar="HASH", help="also accept code with this SHA-256, which verify prints")


def run(arguments: argparse.Namespace) -> int:
    """Downloads a checkpoint, and keeps it if its checks pass."""
    from ms_resampler.hub_upload.check import pull

    pull(arguments.repository, arguments.folder, allow_code=arguments.allow_code)
    return 0
