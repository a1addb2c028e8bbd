"""A study's stored results, small enough for version control: runs, how they were made, tower and reader.

A *block* is a seed, with the tower, the reader and the kind of machine that a run was made with. Runs are compared
within blocks only, so that results of several machines can stand in one study.
"""

import dataclasses
import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ms_resampler.folders import copy_whole, whole_file, write_whole

from ..timing import machine
from .data import TOWER, DataSettings, data_folder
from .plan import ABLATIONS, CHANGED, OURS, PEERS, REFERENCE, Run, Study, changed_by
from .reader import READER
from .statistics import Difference, Estimate, difference, estimate, score_matrix
from .worlds import EVEN, MARGINS, UNEVEN

ROOT = Path(__file__).resolve().parents[2]
REPORT, RESULTS = ROOT / "docs", ROOT / "research" / "results"  # of this repository
RUNS, ABOUT = "runs.jsonl.gz", "study.json"
ENOUGH_SEEDS = 5
Block = tuple[str, int]  # what a run was made with, and its seed
Key = tuple[str, str, str]  # an arm, how it is trained (see `mode_of`), and the tokens it is asked for


@dataclass(frozen=True)
class Results:
    """What was asked (`study`), the learning rates chosen, what the projectors cost, and all runs that are done."""

    study: dict[str, Any]
    rates: dict[str, float]
    costs: dict[str, Any]
    runs: list[dict[str, Any]]

    @cached_property
    def scores(self) -> dict[Key, dict[Block, np.ndarray]]:
        """Test scores (F, B) by block, at the chosen learning rates."""
        return self._by_block("test", score_matrix)

    @cached_property
    def validation(self) -> dict[Key, dict[Block, np.ndarray]]:
        """Overall validation scores () by block, at the chosen learning rates."""
        return self._by_block("validation", np.array)

    def _by_block(self, split: str, read: Callable[[Any], np.ndarray]) -> dict[Key, dict[Block, np.ndarray]]:
        """What the runs say about a split, by block."""
        found: dict[Key, dict[Block, np.ndarray]] = {}
        for result in self.runs:
            run = result["run"]
            if run["learning_rate"] == self.rates.get(changed_by(run["arm"])):
                for tokens, scores in result[split].items():
                    key = run["arm"], mode_of(run), tokens
                    found.setdefault(key, {})[result["made_with"], run["seed"]] = read(scores)
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

    def ablations(self, base: str) -> list[str]:
        """The ablations of a projector that have results."""
        return [arm for arm in ABLATIONS if changed_by(arm) == base and (arm, "fixed", self.middle) in self.scores]

    def contenders(self, tokens: str) -> list[Key]:
        """What the main table of a budget compares: the projectors, and those that keep every patch.

        Ours is the first; one that shares no block with those before it, or would leave them too few, is left out.
        """
        kept = [(arm, "fixed", "144") for arm in REFERENCE if (arm, "fixed", "144") in self.scores]
        entrants = [*((arm, "fixed", tokens) for arm in self.arms(tokens) if arm not in REFERENCE), *kept]
        shared, contenders = None, []
        for key in entrants:
            blocks = set(self.scores[key]) if shared is None else shared & set(self.scores[key])
            if blocks and (len(blocks) >= ENOUGH_SEEDS or not shared or len(shared) < ENOUGH_SEEDS):
                shared = blocks
                contenders.append(key)
        return contenders

    def blocks(self, *keys: Key) -> list[Block]:
        """The blocks in which all of these have a result. Raises ValueError if there is none."""
        shared = sorted(set.intersection(*(set(self.scores.get(key, {})) for key in keys))) if keys else []
        if not shared:
            arms = ", ".join(arm for arm, _, _ in keys) or OURS
            raise ValueError(f"No seed is finished yet for all of {arms}: go on with the study.")
        return shared

    def comparable(self, *keys: Key) -> bool:
        """Whether some block has a result of all."""
        return bool(set.intersection(*(set(self.scores.get(key, {})) for key in keys)))

    def estimates(self, *keys: Key) -> dict[Key, Estimate]:
        """Means and intervals, over the blocks that all of these share."""
        blocks = self.blocks(*keys)
        return {key: estimate(np.stack([self.scores[key][block] for block in blocks])) for key in keys}

    def difference(self, one: Key, other: Key) -> Difference:
        """One minus another, over the blocks that both have."""
        blocks = self.blocks(one, other)
        ours, other_ = (np.stack([self.scores[key][block] for block in blocks]) for key in (one, other))
        validation = [self.validation[one][block] - self.validation[other][block] for block in blocks]
        return difference(ours, other_, np.array(validation))

    def change(self, before: Sequence[Key], after: Sequence[Key]) -> Difference:
        """How much greater a difference, of one minus another, is with one pair of keys than with the pair before."""
        blocks = self.blocks(*before, *after)

        def differences(scores: dict[Key, dict[Block, np.ndarray]], one: Key, other: Key) -> np.ndarray:
            return np.stack([scores[one][block] - scores[other][block] for block in blocks])

        later, earlier = (differences(self.scores, *pair) for pair in (after, before))
        validation = differences(self.validation, *after) - differences(self.validation, *before)
        return difference(later, earlier, validation)

    def parameters(self, arm: str, tokens: str) -> int:
        """Parameters of an arm's projector at a budget."""
        return next(r["parameters"] for r in self.runs if r["run"]["arm"] == arm and list(r["test"]) == [tokens])

    def scopes(self, tokens: str) -> list[dict[str, Any]]:
        """What the runs of ms_resampler at a budget say about their scopes, seed by seed."""
        return [
            result["scopes"]
            for result in sorted(self.runs, key=lambda result: result["run"]["seed"])
            if result["run"]["arm"] == OURS
            and mode_of(result["run"]) == "fixed"
            and list(result["test"]) == [tokens]
            and result["run"]["learning_rate"] == self.rates[OURS]
        ]


def mode_of(run: dict[str, Any]) -> str:
    """How a run was trained: "fixed" for one budget, "elastic" for several at random, or "together"; in another world,
    the world's name.
    """
    if run["world"] != EVEN:
        return run["world"]
    return "together" if run["together"] else "elastic" if len(run["grids"]) > 1 else "fixed"


def collect(study: Study, rates: dict[str, float], costs: dict[str, Any], results: Sequence[dict[str, Any]]) -> Results:
    """The results of a study, each run once, without what no table or figure needs."""
    runs = {json.dumps(result["run"]): compact(result) for result in results}
    order, worlds = [*PEERS, *REFERENCE, *CHANGED], [EVEN, *MARGINS, *UNEVEN]
    ordered = sorted(
        runs.values(),
        key=lambda r: (
            order.index(r["run"]["arm"]),
            worlds.index(r["run"]["world"]),
            -len(r["run"]["grids"]),
            r["run"]["together"],
            r["run"]["grids"],
            r["run"]["seed"],
        ),
    )
    return Results(json.loads(json.dumps(dataclasses.asdict(study))), rates, costs, ordered)


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """A run, with maps of ms_resampler's first seed only."""
    run, small = result["run"], dict(result)
    if "scopes" in result and (run["arm"] != OURS or run["seed"] or run["world"] != EVEN):
        small["scopes"] = {key: value for key, value in result["scopes"].items() if key != "maps"}
    return json.loads(json.dumps(small))


def results_folder(report: Path) -> Path:
    """Where the results behind a report are stored: in `study/` beside it, but for this repository's own."""
    return RESULTS if report.resolve() == REPORT else report / "study"


def save(results: Results, folder: Path, out: Path) -> None:
    """Writes settings and runs into a folder, and copies the tower and the reader of OUT beside them."""
    for name in (TOWER, READER):
        copy_whole(data_folder(out, DataSettings(**results.study["data"])) / name, folder / name)
    about = {"study": results.study, "rates": results.rates, "costs": results.costs}
    lines = "".join(json.dumps(run) + "\n" for run in results.runs)
    with whole_file(folder / RUNS) as fresh:
        fresh.write_bytes(gzip.compress(lines.encode(), mtime=0))  # the same bytes for the same runs
    write_whole(folder / ABOUT, json.dumps(about, indent=2) + "\n")


def load(folder: Path) -> Results:
    """Reads what `save` wrote. Raises ValueError if it is not there, or was written by another version."""
    if not (folder / ABOUT).exists():
        raise ValueError(f"There are no results of a study in {folder}: run `python -m research.study` first.")
    lines = gzip.decompress((folder / RUNS).read_bytes()).splitlines()
    about, runs = json.loads((folder / ABOUT).read_text()), [json.loads(line) for line in lines]
    current = about.keys() == {"study", "rates", "costs"} and all("made_with" in run for run in runs)
    current = current and all(run["run"].keys() <= {field.name for field in dataclasses.fields(Run)} for run in runs)
    if not (current and all("forward_x" in cost for cost in about["costs"]["projectors"].values())):
        raise ValueError(f"{folder} was stored by another version of the study: move it away, or use that version.")
    return Results(**about, runs=[run | {"run": dataclasses.asdict(run_of(run))} for run in runs])


def adopt(folder: Path, out: Path) -> int:
    """Puts what is stored in a folder into OUT: tower, reader and results; returns how many results.

    Raises ValueError if OUT holds another tower or reader: no result of its runs could be paired with those stored.
    """
    stored = load(folder)
    target = data_folder(out, DataSettings(**stored.study["data"]))
    for name in (TOWER, READER):
        if (target / name).exists() and fingerprint(target / name) != fingerprint(folder / name):
            raise ValueError(f"{target / name} is not the one stored in {folder}: work in a new folder (--out).")
        copy_whole(folder / name, target / name)
    for result in stored.runs:
        path = result_path(out, run_of(result))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(result))
    return len(stored.runs)


def run_of(result: dict[str, Any]) -> Run:
    """The run that made a result."""
    run = result["run"]
    grids = tuple((rows, columns) for rows, columns in run["grids"])
    return Run(**{**run, "grids": grids, "data": DataSettings(**run["data"])})


def result_path(out: Path, run: Run) -> Path:
    """Where the result of a run is kept."""
    return out / "runs" / f"{run.name}.json"


def made_with(folder: Path) -> str:
    """The kind of machine, its versions, and the tower and reader of a data folder: what a seed is comparable under."""
    return f"{machine()}; tower and reader {fingerprint(folder / TOWER, folder / READER)[:8]}"


def fingerprint(*files: Path) -> str:
    """A hash of what is in some files; of a compressed one, of what it holds."""
    contents = (path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes()) for path in files)
    return hashlib.sha256(b"".join(contents)).hexdigest()
