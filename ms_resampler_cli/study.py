"""`ms-resampler study`: the study of the folder research/, which a checkout has and an installed package has not."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of a study. Raises ValueError where there is no checkout."""
    try:
        from research.study.__main__ import add_arguments as add_study_arguments
    except ModuleNotFoundError as error:
        raise ValueError(
            "the study is not part of the installed package: run `python -m research.study` in a checkout of the "
            "repository, with `pip install -e '.[eval]'` done there."
        ) from error
    add_study_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the study; returns the exit code."""
    from research.study.__main__ import run as run_study

    return run_study(arguments)
