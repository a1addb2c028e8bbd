"""`ms-resampler study`: the study of the folder research/, which a checkout has and an installed package has not."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of a study."""
    parser.add_argument("--quick", action="store_true", help="six projectors, one budget, two seeds: ten minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="where to work (default: %(default)s)")
    parser.add_argument(
        "--projectors", nargs="+", metavar="NAME", help="beside ms_resampler and resampler (default: all there are)"
    )
    parser.add_argument("--budgets", nargs="+", type=int, metavar="TOKENS", help="default: 36 16 9, of 144 patches")
    parser.add_argument("--seeds", type=int, help="default: 5")
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="RATE", help="default: 0.001 0.002 0.004")
    parser.add_argument("--steps", type=int, help="of each training (default: 600)")
    parser.add_argument("--scenes", type=int, help="to train on (default: 12000)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core, or one for a GPU)")
    parser.add_argument("--no-ablations", action="store_true", help="only the projectors, each at its budgets")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="of study.md and its figures (default: OUT)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--finished", action="store_true", help="train nothing: report what is finished")
    only.add_argument("--check", type=Path, metavar="FOLDER", help="only check the report there against its results")


def run(arguments: argparse.Namespace) -> int:
    """Runs the study; returns the exit code. Raises ValueError where there is no checkout."""
    try:
        from research.study.__main__ import run as run_study
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "research":
            raise
        raise ValueError(
            "the study is not part of the installed package: run `python -m research.study` in a checkout of the "
            "repository, with `pip install -e '.[eval]'` done there."
        ) from error
    return run_study(arguments)
