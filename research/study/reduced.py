"""Scores the study's MLP with what DivPrune leaves of its tokens.

DivPrune needs no training, but the MLP's runs are trained again, because the study keeps no weights.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ms_resampler.reducers_ms_resampler import DivPrune, read_reducer

from ..timing import markdown_table
from .data import PATCHES
from .plan import REFERENCE, Run, Study
from .results import adopt, load, results_folder, run_of
from .run import data_of, score_split, train
from .statistics import GROUPS, group_means, score_matrix
from .workers import worker_pool


def reducers_of(name: str, budgets: Sequence[int]) -> list[DivPrune]:
    """A reducer at each budget. Raises ValueError for one that the study cannot have."""
    reducers = []
    for budget in sorted(budgets, reverse=True):
        reducer = read_reducer({"reducer_type": name, "keep": budget})
        if not isinstance(reducer, DivPrune):
            raise ValueError(f"{name} reads a CLS token or a language model, and a study has none: use divprune.")
        reducer.count(PATCHES)
        reducers.append(reducer)
    return reducers


def scores_of(run: Run, reducers: Sequence[DivPrune], out: Path) -> list[dict[str, str]]:
    """The test scores of a run's projector with all tokens, and with what each reducer leaves."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data_of(run, out)
    student, _, _ = train(run, data, device)
    with torch.inference_mode():
        return [score_split(student, run.grids[0], data.splits["test"], device, one) for one in (None, *reducers)]


def reduced_table(study: Study, name: str, out: Path, report: Path, workers: int) -> str:
    """Mean scores over the seeds of the MLP by how many tokens are left, as Markdown."""
    reducers, folder = reducers_of(name, study.budgets), results_folder(report)
    stored = load(folder)
    adopt(folder, out)
    made = [run_of(result) for result in stored.runs if result["run"]["arm"] in REFERENCE]
    runs = [run for run in made if run.seed < study.seeds and run.learning_rate == stored.rates[run.arm]]
    if not runs:
        raise ValueError(f"There is no run of {', '.join(REFERENCE)} in {folder} to reduce.")
    with worker_pool(workers) as pool:
        scores = list(pool.map(functools.partial(scores_of, reducers=reducers, out=out), runs))
    rows = []
    for tokens, of_seeds in zip([PATCHES, *(one.keep for one in reducers)], zip(*scores, strict=True), strict=True):
        means_G = np.mean([group_means(np.nanmean(score_matrix(one), axis=1)) for one in of_seeds], axis=0)
        rows.append([str(tokens), *(f"{100 * mean:.1f}" for mean in means_G)])
    return markdown_table([f"tokens of the MLP, {name}, {len(runs)} seeds", *GROUPS, "overall"], rows)
