"""`ms-resampler pictures`: builds a suite of questions about pictures from free packages."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `pictures`."""
    parser.add_argument("out", type=Path, help="new folder of the suite")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the tasks (default: all)")
    parser.add_argument("--questions", type=int, default=300, metavar="N", help="a task and test split (default: 300)")
    parser.add_argument(
        "--train-questions", type=int, default=3000, metavar="N", help="a task, for training (default: 3000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pictures (default: 0)")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="npm packages, laid out like node_modules; npm fetches what is missing (default: a folder in ~/.cache)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Builds the suite, and prints what it holds."""
    from ms_resampler.pictures import build_pictures

    said = build_pictures(
        arguments.out,
        arguments.tasks,
        questions=arguments.questions,
        train_questions=arguments.train_questions,
        seed=arguments.seed,
        packages=arguments.packages,
    )
    for split, tasks in said["splits"].items():
        questions, pictures = (sum(task[field] for task in tasks.values()) for field in ("questions", "pictures"))
        print(f"{split}: {questions} questions about {pictures} pictures in {len(tasks)} tasks")
    if arguments.tasks is None and said["left_out"]:
        print(f"Left out, since apt-get cannot fetch Debian 12's manuals here: {', '.join(said['left_out'])}")
    return 0
