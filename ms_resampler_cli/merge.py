"""`ms-resampler merge`: merges the adapters of a run into a whole model."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `merge`."""
    parser.add_argument("run", type=Path, help="folder of a run with adapters (or its folder `adapter`)")
    parser.add_argument("out", type=Path, help="new folder for the whole model")
    parser.add_argument("--model", help="the model that the run started from, if it has moved")


def run(arguments: argparse.Namespace) -> int:
    """Merges, and prints how to load the result."""
    from ms_resampler.training.merge import merge

    merge(arguments.run, arguments.out, arguments.model)
    print(f'AutoModelForImageTextToText.from_pretrained("{arguments.out}", trust_remote_code=True)')
    return 0
