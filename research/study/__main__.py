"""Trains every projector under the same conditions, and reports who wins and by how much.

python -m research.study --quick                          six projectors, one budget, two seeds: ten minutes
python -m research.study --seeds 10 --report docs         goes on from research/results, and writes docs/study.md
python -m research.study --check docs                     checks that report against the stored results
"""

import argparse
import sys
from collections.abc import Sequence

from ms_resampler_cli.study import add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Runs the study that is asked for, or checks a report; returns the exit code."""
    from dataclasses import replace

    from .conduct import conduct
    from .plan import BASELINE, OURS, QUICK, Study
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
