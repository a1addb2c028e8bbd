"""Conducts a study: chooses learning rates, trains what is missing, in several processes, and reports."""

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from ms_resampler.training.trainer import keep_freed_memory

from .costs import measure_costs
from .data import data_folder, prepare_data
from .plan import LOCAL, OURS, Run, Study, further_runs, main_runs, margin_runs, rehearse, sweep_runs, world_runs
from .reader import pretrained_reader
from .report import report_text, write_report
from .results import Results, adopt, collect, load, made_with, result_path, results_folder, run_of, save
from .run import perform
from .statistics import overall
from .workers import worker_pool
from .worlds import in_world

PLANS = (main_runs, further_runs, margin_runs, world_runs)  # once learning rates are chosen


def conduct(
    study: Study, out: Path, report: Path | None = None, workers: int | None = None, train: bool = True
) -> None:
    """Makes the data and runs that are missing in `out`, and writes the report into a folder (default: `out`).

    Results that are stored with the report are adopted and kept. Without `train`, reports what is finished. Raises
    ValueError if a projector cannot have a budget, if stored results would be lost, or if too little is finished.
    """
    rehearse(study)
    report = report or out
    folder = results_folder(report)
    # OUT keeps every run; another folder holds only what is stored in it.
    stored = load(folder) if report.resolve() != out.resolve() and (folder / "study.json").exists() else None
    if stored:
        refuse_loss(study, stored, folder)
        print(f"{adopt(folder, out)} results stored in {folder}")
    rates, results = perform_study(study, out, workers) if train else finished_runs(study, out)
    costs = stored.costs if stored and not train else measure_costs(study)
    collected = collect(study, rates, costs, [*(stored.runs if stored else []), *results])
    report_text(collected)  # refuses what is too little for a report, before anything is written over
    save(collected, folder, out)
    write_report(report)


def refuse_loss(study: Study, stored: Results, folder: Path) -> None:
    """Raises ValueError if results are stored in a folder that a study does not ask for: they would be lost there."""
    names = {run.name for rate in study.learning_rates for run in all_runs(study, dict.fromkeys(study.arms, rate))}
    lost = [run for run in map(run_of, stored.runs) if run.name not in names]
    if lost:
        raise ValueError(
            f"{folder} holds {len(lost)} results that this study does not ask for, such as {lost[0].arm} with seed "
            f"{lost[0].seed}: ask for them, too (they are of --seeds {stored.study['seeds']}), or report elsewhere."
        )


def all_runs(study: Study, rates: dict[str, float]) -> list[Run]:
    """What a study runs, once its learning rates are chosen."""
    return [*sweep_runs(study), *(run for plan in PLANS for run in plan(study, rates))]


def perform_study(study: Study, out: Path, workers: int | None) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The learning rates chosen, and the results of all runs; processes share the work, a thread each."""
    out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    print(f"Data and reader, in {out}:", flush=True)
    data = prepare_data(out, study.data, workers)
    pretrained_reader(data, study.data.reader_steps)
    with worker_pool(workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)) as pool:
        results = list(perform_all("Learning rates", sweep_runs(study), out, pool))
        rates = best_rates(study, results)
        here = pool.submit(made_with, data_folder(out, study.data)).result()
        projectors, further, amid_paper, worlds = (plan(study, rates) for plan in PLANS)
        for world in dict.fromkeys(run.world for run in worlds):
            in_world(data, world, study.data.position_scale)  # makes its files, once
        for title, runs, compared_with in (
            ("Projectors", projectors, projectors),
            ("Ablations and elastic budgets", further, projectors),
            ("Scenes amid paper", amid_paper, amid_paper),
            ("Worlds", worlds, worlds),
        ):
            elsewhere = seeds_of_elsewhere(compared_with, out, here)
            results += perform_all(title, comparable_here(runs, out, elsewhere), out, pool)
    return rates, results


def seeds_of_elsewhere(runs: Sequence[Run], out: Path, here: str) -> set[int]:
    """The seeds whose runs of ms_resampler are all done, and none of them with what is `here`."""
    ours = [run for run in runs if run.arm == OURS]
    made = [perform(run, out)["made_with"] if result_path(out, run).exists() else here for run in ours]
    return {run.seed for run in ours} - {run.seed for run, what in zip(ours, made, strict=True) if what == here}


def comparable_here(runs: Sequence[Run], out: Path, elsewhere: set[int]) -> list[Run]:
    """The runs, but for those that are missing of seeds of elsewhere: made here, nothing would compare with them."""
    kept = [run for run in runs if run.seed not in elsewhere or result_path(out, run).exists()]
    if len(kept) < len(runs):
        print(
            f"Left out: {len(runs) - len(kept)} runs of seeds {', '.join(map(str, sorted(elsewhere)))}, whose runs of "
            f"{OURS} were made on another kind of machine, or with other versions. More --seeds are run here whole.",
            flush=True,
        )
    return kept


def finished_runs(study: Study, out: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What `perform_study` would return if nothing were missing of what is. Raises ValueError if that is too little."""

    def finished(runs: Sequence[Run]) -> list[dict[str, Any]]:
        return [perform(run, out) for run in runs if result_path(out, run).exists()]

    swept = finished(sweep_runs(study))
    if missing := len(sweep_runs(study)) - len(swept):
        raise ValueError(
            f"{missing} runs of the choice of learning rates are missing in {out}: first go on without --finished."
        )
    rates = best_rates(study, swept)
    plans = (plan(study, rates) for plan in PLANS)
    return rates, swept + [result for runs in plans for result in finished(runs)]


def best_rates(study: Study, swept: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For every projector the learning rate with the best validation score, the smaller one of equals."""
    if not swept:
        return dict.fromkeys(study.arms, study.learning_rates[0])
    rates = {}
    for arm in (arm for arm in study.arms if arm != LOCAL):
        results = [result for result in swept if result["run"]["arm"] == arm]
        scores = {result["run"]["learning_rate"]: next(iter(result["validation"].values())) for result in results}
        rates[arm] = max(scores, key=lambda rate: (scores[rate], -rate))
    return rates | ({LOCAL: rates[OURS]} if LOCAL in study.arms else {})


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
