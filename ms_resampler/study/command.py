"""`ms-resampler study`: trains every projector under the same conditions, and reports who wins and by how much."""

import argparse
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ..training.train import keep_freed_memory
from .costs import measure_costs
from .data import prepare_data
from .plan import BASELINE, OURS, QUICK, Run, Study, further_runs, main_runs, rehearse, sweep_runs
from .reader import pretrained_reader
from .report import check_report, write_report
from .results import adopt, collect, load, result_path, save
from .run import perform
from .statistics import overall


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `study`."""
    default = Study()
    parser.add_argument("--quick", action="store_true", help="six projectors, one budget, two seeds: ten minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="where to work (default: %(default)s)")
    parser.add_argument(
        "--projectors",
        nargs="+",
        metavar="NAME",
        help=f"beside ms_resampler and resampler: of {', '.join(default.arms[2:])}",
    )
    parser.add_argument("--budgets", nargs="+", type=int, metavar="TOKENS", help="default: 36 16 9, of 144 patches")
    parser.add_argument("--seeds", type=int, help="default: 5")
    parser.add_argument("--learning-rates", nargs="+", type=float, metavar="RATE", help="default: 0.001 0.002 0.004")
    parser.add_argument("--steps", type=int, help="of each training (default: 600)")
    parser.add_argument("--scenes", type=int, help="to train on (default: 12000)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core, or one for a GPU)")
    parser.add_argument("--no-ablations", action="store_true", help="only the projectors, each at its budgets")
    report = parser.add_mutually_exclusive_group()
    report.add_argument("--report", type=Path, metavar="FOLDER", help="of study.md and its figures (default: OUT)")
    parser.add_argument("--finished", action="store_true", help="train nothing: report what is finished")
    report.add_argument("--check", type=Path, metavar="FOLDER", help="only check the report there against its results")


def run(arguments: argparse.Namespace) -> int:
    """Makes what is missing of data and runs, and the report; what was finished, or is stored there, is kept."""
    if arguments.check:
        check_report(arguments.check)
        print(f"{arguments.check / 'study.md'} and its figures are those of the stored results.")
        return 0
    study, out = study_of(arguments), arguments.out
    rehearse(study)
    folder = arguments.report or out
    print(f"{adopt(folder / 'study', out)} results stored in {folder / 'study'}")
    if arguments.finished:
        rates, results = finished_runs(study, out)
        costs = load(folder / "study").costs
    else:
        rates, results = perform_study(study, out, arguments.workers)
        print("Costs ...", flush=True)
        costs = measure_costs(study)
    save(collect(study, rates, costs, results), folder / "study", out)
    write_report(folder)
    print(f"The report is {folder / 'study.md'}.")
    return 0


def perform_study(study: Study, out: Path, workers: int | None) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The learning rates chosen, and the results of all runs; processes share the work, a thread each."""
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    print(f"Data and reader, in {out}:", flush=True)
    pretrained_reader(prepare_data(out, study.data), study.data.reader_steps)
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker) as pool:
        results = list(perform_all("Learning rates", sweep_runs(study), out, pool))
        rates = best_rates(study, results)
        results += perform_all("Projectors", main_runs(study, rates), out, pool)
        results += perform_all("Ablations and elastic budgets", further_runs(study, rates), out, pool)
    return rates, results


def finished_runs(study: Study, out: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What `perform_study` would return if nothing were missing of what is."""

    def finished(runs: Sequence[Run]) -> list[dict[str, Any]]:
        return [perform(run, out) for run in runs if result_path(out, run).exists()]

    results = finished(sweep_runs(study))
    rates = best_rates(study, results)
    return rates, results + finished(main_runs(study, rates)) + finished(further_runs(study, rates))


def begin_worker() -> None:
    """One thread for each process, which ends with the one that started it, however that ends."""
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Waits for the process that started this one to end, then ends this one: a pool's own workers would stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def study_of(arguments: argparse.Namespace) -> Study:
    """The study that the command line asks for; what the others are compared with is always part of it."""
    study = QUICK if arguments.quick else Study()
    changes: dict[str, Any] = {
        "arms": arguments.projectors and tuple(dict.fromkeys([OURS, BASELINE, *arguments.projectors])),
        "budgets": arguments.budgets and tuple(arguments.budgets),
        "seeds": arguments.seeds,
        "learning_rates": arguments.learning_rates and tuple(arguments.learning_rates),
        "steps": arguments.steps,
        "data": arguments.scenes and dataclasses.replace(study.data, train_scenes=arguments.scenes),
    }
    changes = {name: value for name, value in changes.items() if value}
    return dataclasses.replace(study, **changes, ablations=study.ablations and not arguments.no_ablations)


def best_rates(study: Study, swept: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For every projector the learning rate with the best validation score, the smaller one of equals."""
    if not swept:
        return dict.fromkeys(study.arms, study.learning_rates[0])
    rates = {}
    for arm in study.arms:
        results = [result for result in swept if result["run"]["arm"] == arm]
        scores = {result["run"]["learning_rate"]: next(iter(result["validation"].values())) for result in results}
        rates[arm] = max(scores, key=lambda rate: (scores[rate], -rate))
    return rates


def perform_all(title: str, runs: Sequence[Run], out: Path, pool: ProcessPoolExecutor) -> Iterator[dict[str, Any]]:
    """The results of all runs, as they finish, with a line of progress each."""
    if not runs:
        return
    missing = [run for run in runs if not result_path(out, run).exists()]
    print(f"{title}: {len(runs)} runs, {len(runs) - len(missing)} of them done before", flush=True)
    yield from (perform(run, out) for run in runs if run not in missing)
    start, futures = time.monotonic(), {pool.submit(perform, run, out): run for run in missing}
    for done, future in enumerate(as_completed(futures), start=1):
        result, run = future.result(), futures[future]
        score = overall(next(iter(result["test"].values())))
        left = (time.monotonic() - start) / done * (len(missing) - done)
        print(
            f"  {done}/{len(missing)} {run.arm}, {run.tokens} tokens, rate {run.learning_rate:g}, seed {run.seed}: "
            f"{score:.1%} ({result['seconds']:.0f} s; about {left / 60:.0f} min left)",
            flush=True,
        )
        yield result
