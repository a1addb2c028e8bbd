"""`ms-resampler study`, in a checkout only: research/ is not part of the installed package."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of a study."""
    from research.study.__main__ import add_arguments as add_study_arguments

    add_study_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the study; returns the exit code."""
    from research.study.__main__ import run as run_study

    return run_study(arguments)
