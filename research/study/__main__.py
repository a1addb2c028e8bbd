"""Trains every projector under the same conditions, and reports who wins and by how much.

python -m research.study --quick                          six projectors, one budget, two seeds: ten minutes
python -m research.study --seeds 10 --report docs         goes on from research/results, and writes docs/study.md
python -m research.study --reducer divprune --report docs  trains the MLP's runs again, scores what it leaves
python -m research.study --check docs                     checks that report against the stored results
"""

import argparse
import sys
from collections.abc import Sequence
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
    only.add_argument(
        "--reducer",
        metavar="NAME",
        help="train the stored runs of the MLP again, and score what divprune leaves",
    )
    only.add_argument("--finished", action="store_true", help="train nothing: report what is finished")
    only.add_argument("--check", type=Path, metavar="FOLDER", help="only check the report there against its results")


def run(arguments: argparse.Namespace) -> int:
    """Runs the study that is asked for, or checks a report; returns the exit code."""
    from dataclasses import replace

    from .conduct import conduct
    from .plan import BASELINE, OURS, QUICK, Study
    from .reduced import reduced_table
    from .report import check_report

    if arguments.check:
        check_report(arguments.check)
        print(f"{arguments.check / 'study.md'} and its figures are those of the stored results.")
        return 0
    study = QUICK if arguments.quick else Study()
    changes = {
        "arms": arguments.projectors and tuple(dict.fromkeys([OURS, BASELINE, *arguments.projectors])),
        "budgets": arguments.budgets and tuple(arguments.budgets),
        "seeds": arguments.seeds,
        "learning_rates": arguments.learning_rates and tuple(arguments.learning_rates),
        "steps": arguments.steps,
        "data": arguments.scenes and replace(study.data, train_scenes=arguments.scenes),
        "ablations": study.ablations and not arguments.no_ablations,
    }
    study = replace(study, **{name: value for name, value in changes.items() if value is not None})
    if arguments.reducer:
        report, workers = arguments.report or arguments.out, arguments.workers or 1
        print(reduced_table(study, arguments.reducer, arguments.out, report, workers))
        return 0
    conduct(study, arguments.out, arguments.report, arguments.workers, train=not arguments.finished)
    print(f"The report is {(arguments.report or arguments.out) / 'study.md'}.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `python -m research.study`; returns the exit code, 2 for what cannot be studied."""
    parser = argparse.ArgumentParser(
        prog="python -m research.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
