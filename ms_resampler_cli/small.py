"""`ms-resampler small`: builds the small model of real parts."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the argument of `small`."""
    parser.add_argument("out", type=Path, metavar="DIR", help="new folder for the model")


def run(arguments: argparse.Namespace) -> int:
    """Builds the model, and prints what it consists of."""
    from transformers.utils import logging

    from ms_resampler.assembly import parameter_table
    from ms_resampler.small import build_small

    logging.set_verbosity_error()
    assembled = build_small(arguments.out)
    print(parameter_table(assembled.model))
    ask = f'ms-resampler chat --model {arguments.out} --image PICTURE "What is in the picture?"'
    print(f"The model is in {arguments.out}. Next: {ask}")
    return 0
