"""`ms-resampler evaluate`: scores models on benchmarks, beside published rows."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from .arguments import add_reducer_arguments, add_tiles_argument, budget, reducer_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `evaluate`."""
    parser.add_argument("model", nargs="*", help="folders or Hub repositories; the others are compared with the first")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["ten"],
        metavar="TASK",
        help="ten, all, single tasks, paths of suites (default: ten)",
    )
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of the runs (default: evaluation)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with DIR/TASK in the release's layout (default: from the Hub)"
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        type=split_of_task,
        metavar="TASK=SPLIT",
        help="another split; repeatable",
    )
    parser.add_argument(
        "--visual-tokens",
        nargs="+",
        type=budget,
        default=[None],
        metavar="N",
        help="visual tokens per picture: counts such as 36, grids such as 4x9, auto (default: the model's)",
    )
    add_tiles_argument(parser)
    add_reducer_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default: 16)")
    parser.add_argument("--limit", type=int, metavar="N", help="ask only the first N questions of a task")
    parser.add_argument("--blind", action="store_true", help="ask without the pictures, to measure guessing")
    parser.add_argument(
        "--judge", metavar="MODULE:FUNCTION", help="a judge for MM-Vet and MMBench; see docs/evaluation.md"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the model's repository")
    parser.add_argument(
        "--url", help="OpenAI-compatible address that serves the model, such as http://localhost:8000/v1"
    )
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="RUN", help="evaluate nothing; print a table of finished runs"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="plot scores against visual tokens and time")
    parser.add_argument("--model-index", metavar="NAME", help="print a model card's metadata for the first run instead")


def split_of_task(text: str) -> tuple[str, str]:
    """A task and a split: "vqav2=test-dev" -> ("vqav2", "test-dev")."""
    task, equals, split = text.partition("=")
    if not (task and equals and split):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=SPLIT")
    return task, split


def run(arguments: argparse.Namespace) -> int:
    """Evaluates every model at every budget and prints the table; returns 2 if a task's data could not be read."""
    from ms_resampler.evaluation import figure, has_failed_tasks, model_index, report

    if bool(arguments.model) == bool(arguments.report):
        raise ValueError("Name a model to evaluate, or finished runs with --report.")
    runs = arguments.report or evaluated(arguments)
    if not runs:  # not the main process
        return 0
    if arguments.figure:
        figure(runs, arguments.figure)
    index = arguments.model_index
    print(model_index(runs[0], index) if index else report(runs, markdown=arguments.markdown))
    return 2 if has_failed_tasks(runs) else 0


def evaluated(arguments: argparse.Namespace) -> list[Path]:
    """The folders of the runs; empty in all but the main process."""
    from accelerate import PartialState

    from ms_resampler.evaluation import Options, evaluate

    if arguments.batch_size < 1 or (arguments.limit is not None and arguments.limit < 1):
        raise ValueError("--batch-size and --limit must be at least 1.")
    options = Options(
        data=arguments.data,
        tiles=arguments.tiles,
        reducer=reducer_of(arguments),
        splits=dict(arguments.split),
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        blind=arguments.blind,
        judge=judge_named(arguments.judge) if arguments.judge else None,
        revision=arguments.revision,
        url=arguments.url,
    )
    asked: dict[Path, tuple[str, Any]] = {}
    for model, visual_tokens in product(arguments.model, arguments.visual_tokens):
        out = arguments.out / run_name(model, visual_tokens, arguments.blind, options.reducer, options.tiles)
        if out in asked:
            raise ValueError(
                f"{asked[out][0]} and {model} would both be evaluated in {out}: evaluate them one at a time, each with "
                "another --out, and compare them with --report."
            )
        asked[out] = model, visual_tokens
    for out, (model, visual_tokens) in asked.items():
        evaluate(model, arguments.tasks, out, replace(options, visual_tokens=visual_tokens))
    runs = list(asked)
    return runs if PartialState().is_main_process else []


def run_name(
    model: str, visual_tokens: Any, blind: bool, reducer: Mapping[str, Any] | None = None, tiles: Any = None
) -> str:
    """The folder of a run: the model's name, the budget, the tiles, the reducer and whether it is blind."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "--")

    def told(value: Any) -> Any:
        return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else value

    cut = None if tiles is None else f"tiles{told(tiles)}"
    dropped = [
        value if field in ("reducer_type", "keep") else f"{field}{told(value)}"
        for field, value in (reducer or {}).items()
    ]
    parts = (name, told(visual_tokens), cut, *dropped, "blind" if blind else None)
    return "-".join(str(part) for part in parts if part is not None)


def judge_named(name: str) -> Any:
    """The function MODULE:FUNCTION. Raises ValueError if there is none."""
    from importlib import import_module

    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"There is no function {name!r}; --judge takes MODULE:FUNCTION.") from error
