"""A study's stored results: one file of runs, small enough for version control, and how it was made."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .data import DataSettings
from .plan import ABLATIONS, OURS, PEERS, REFERENCE, Run, Study
from .statistics import Difference, Estimate, difference, estimate, score_matrix


@dataclass(frozen=True)
class Results:
    """What was asked (`study`), the learning rates chosen, what the projectors cost, and all runs that are done.

    `caution` is what a reader of the report must know of these runs beside the numbers, if anything.
    """

    study: dict[str, Any]
    rates: dict[str, float]
    costs: dict[str, Any]
    runs: list[dict[str, Any]]
    caution: str = ""

    @cached_property
    def scores(self) -> dict[tuple[str, str, str], dict[int, np.ndarray]]:
        """Test scores (F, B) by seed, of every (arm, grids trained on, tokens), at the chosen learning rates."""
        found: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
        for result in self.runs:
            run = result["run"]
            if run["learning_rate"] == self.rates.get(run["arm"], self.rates.get(OURS)):
                for tokens, scores in result["test"].items():
                    key = run["arm"], "elastic" if len(run["grids"]) > 1 else "fixed", tokens
                    found.setdefault(key, {})[run["seed"]] = score_matrix(scores)
        return found

    @property
    def budgets(self) -> list[str]:
        """Tokens, the most first."""
        return [str(budget) for budget in sorted(self.study["budgets"], reverse=True)]

    @property
    def middle(self) -> str:
        """The budget of sweep and ablations."""
        return self.budgets[(len(self.budgets) - 1) // 2]

    def arms(self, tokens: str, mode: str = "fixed") -> list[str]:
        """The projectors, ablations aside, that have results at a budget."""
        return [arm for arm in (*PEERS, *REFERENCE) if (arm, mode, tokens) in self.scores]

    def ablations(self) -> list[str]:
        """The ablations that have results."""
        return [arm for arm in ABLATIONS if (arm, "fixed", self.middle) in self.scores]

    def seeds(self, arm: str, tokens: str, mode: str = "fixed") -> int:
        """How many seeds there are."""
        return len(self.scores[arm, mode, tokens])

    def estimate(self, arm: str, tokens: str, mode: str = "fixed") -> Estimate:
        """Means and intervals of an arm."""
        return estimate(np.stack(list(self.scores[arm, mode, tokens].values())))

    def difference(self, one: tuple[str, str, str], other: tuple[str, str, str]) -> Difference:
        """One (arm, mode, tokens) minus another, over the seeds that both have."""
        seeds = sorted(self.scores[one].keys() & self.scores[other].keys())
        return difference(*(np.stack([self.scores[key][seed] for seed in seeds]) for key in (one, other)))

    def parameters(self, arm: str, tokens: str) -> int:
        """Parameters of an arm's projector at a budget."""
        return next(r["parameters"] for r in self.runs if r["run"]["arm"] == arm and list(r["test"]) == [tokens])

    def scopes(self, tokens: str) -> list[dict[str, Any]]:
        """What the runs of ms_resampler at a budget say about their scopes, seed by seed."""
        return [
            result["scopes"]
            for result in sorted(self.runs, key=lambda result: result["run"]["seed"])
            if result["run"]["arm"] == OURS
            and list(result["test"]) == [tokens]
            and result["run"]["learning_rate"] == self.rates[OURS]
        ]


def collect(study: Study, rates: dict[str, float], costs: dict[str, Any], results: Sequence[dict[str, Any]]) -> Results:
    """The results of a study, each run once, without what no table or figure needs."""
    runs = {json.dumps(result["run"]): compact(result) for result in results}
    order = [*PEERS, *REFERENCE, *ABLATIONS]
    ordered = sorted(
        runs.values(),
        key=lambda r: (order.index(r["run"]["arm"]), -len(r["run"]["grids"]), r["run"]["grids"], r["run"]["seed"]),
    )
    return Results(json.loads(json.dumps(dataclasses.asdict(study))), rates, costs, ordered)


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """A run, with maps of ms_resampler's first seed only."""
    run, small = result["run"], dict(result)
    if "scopes" in result and (run["arm"] != OURS or run["seed"]):
        small["scopes"] = {key: value for key, value in result["scopes"].items() if key != "maps"}
    return json.loads(json.dumps(small))


def save(results: Results, folder: Path) -> None:
    """Writes `study.json` and `runs.jsonl` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"study": results.study, "rates": results.rates, "costs": results.costs, "caution": results.caution}
    write_whole(folder / "study.json", json.dumps(about, indent=2) + "\n")
    write_whole(folder / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in results.runs))


def load(folder: Path) -> Results:
    """Reads what `save` wrote. Raises ValueError if it is not there."""
    if not (folder / "study.json").exists():
        raise ValueError(f"There are no results of a study in {folder}: run `ms-resampler study` first.")
    lines = (folder / "runs.jsonl").read_text().splitlines()
    return Results(**json.loads((folder / "study.json").read_text()), runs=[json.loads(line) for line in lines])


def adopt(folder: Path, out: Path) -> int:
    """Puts the results stored in a folder, if there are any, among those of `OUT/runs`; returns how many there are."""
    stored = load(folder).runs if (folder / "study.json").exists() else []
    for result in stored:
        path = result_path(out, run_of(result))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(result))
    return len(stored)


def run_of(result: dict[str, Any]) -> Run:
    """The run that made a result."""
    run = result["run"]
    grids = tuple((rows, columns) for rows, columns in run["grids"])
    return Run(**{**run, "grids": grids, "data": DataSettings(**run["data"])})


def result_path(out: Path, run: Run) -> Path:
    """Where the result of a run is kept."""
    return out / "runs" / f"{run.name}.json"


def fingerprint(*files: Path) -> str:
    """A hash of what is in some files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)
