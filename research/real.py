"""Projectors on a real model: the small one, with the same pretrained parts, words stage, adapters and questions.

    python -m research.real --out runs/real        # resumes; two processes, about 1.5 hours on two cores

Every projector starts from random weights and learns to say the words of its cells (the small model's words stage, in
which the language model is not run), for the same number of steps, at random budgets if it can have several. Then the
small model's adapters, the same for all, answer questions about scenes in a style that was never seen, at 36 and at 16
visual tokens. Behind the MLP, which keeps all 256 patches, reducers leave as many without training.
"""

import argparse
import json
import shutil
import time
from concurrent.futures import as_completed
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ms_resampler.evaluation.run import Options, evaluate
from ms_resampler.folders import write_whole
from ms_resampler.pictures.sources import Shelf
from ms_resampler.pictures.suite import PACKAGE_FOLDER
from ms_resampler.small.features import Features
from ms_resampler.small.parts import TRAINED, start_small
from ms_resampler.small.scenes import Painter, find_drawings
from ms_resampler.small.stages import NAMED, SCENES, small_words
from ms_resampler.small.talk import TASKS, write_suite
from ms_resampler.small.words import DROPOUT, SayingCells, score_names
from ms_resampler.tiny.stages import run_stage

from .study.workers import worker_pool

OURS = "ms_resampler"
SIZES = {"hidden_size": 512, "num_attention_heads": 8}
ARMS: dict[str, dict[str, Any]] = {
    OURS: {},
    "one local scope": {"scope_sigmas": [0.5]},
    "ms_resampler_branches": {"projector_type": "ms_resampler_branches", "query_grid": [6, 6]},
    "resampler": {"projector_type": "resampler", "query_grid": [6, 6]},
    "token_packer": {"projector_type": "token_packer"},
    "avg_pool": {"projector_type": "avg_pool"},
    "mlp": {"projector_type": "mlp"},
}
BUDGETS = ((6, 6), (4, 4))
# It joins whole patches, of which there are 16 x 16: six rows of tokens cannot be had, and it learns four alone.
BUDGETS_OF = {"token_packer": ((4, 4),), "mlp": ((16, 16),)}
REDUCERS = ("divprune", "fastv", "pyramiddrop", "dart", "sparsevlm")  # the others need a tower with a CLS token
NAMES = ("one thing, first", "scene")  # which scores of names are shown
STORED = Path(__file__).parent / "results" / "real.json"
RESAMPLES = 2000


def prepare(out: Path, questions: int) -> None:
    """The features and questions that all runs share."""
    drawings = find_drawings(Shelf(PACKAGE_FOLDER))
    painters = {split: Painter(found, split) for split, found in drawings.items()}
    assembled = start_small()
    for split, count in (("train", SCENES), ("test-style", NAMED)):
        Features(out / "features" / split, painters[split], count).compute(
            assembled.model, assembled.processor.image_processor
        )
    if not (out / "suite").is_dir():
        write_suite(out / "suite", painters["test-style"], questions)


def run(out: Path, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains and scores one projector, or reads the result of an earlier run."""
    path = out / "results" / f"{arm}, {seed}, {steps}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    from peft import PeftModel

    budgets = BUDGETS_OF.get(arm, BUDGETS)
    fields = {"projector_type": "ms_resampler"} | ARMS[arm] | SIZES | {"visual_tokens": budgets[0]}
    assembled = start_small(seed, fields)
    model, processor, work = assembled.model, assembled.processor, out / "work" / f"{arm}, {seed}"
    features = Features(out / "features" / "train", Painter({}, "train"), SCENES)
    saying = SayingCells(model)
    dropped = saying.projector.register_forward_pre_hook(drop_features)
    begin = time.monotonic()
    run_stage(
        small_words(features, steps, seed, None if len(budgets) > 1 else budgets[0]), saying, processor, work / "words"
    )
    seconds = time.monotonic() - begin
    dropped.remove()
    held_out = Features(out / "features" / "test-style", Painter({}, "test-style"), NAMED)
    result: dict[str, Any] = {"arm": arm, "seed": seed, "steps": steps, "seconds": round(seconds)}
    result["parameters"] = sum(parameter.numel() for parameter in saying.projector.parameters())
    result["names"] = {str(grid[0] * grid[1]): score_names(saying, held_out, grid) for grid in budgets}
    model.requires_grad_(True)
    answering: Any = PeftModel.from_pretrained(model.float(), str(TRAINED)).merge_and_unload()
    result["right"] = {
        str(rows * columns): ask(answering.eval(), processor, out, work, Options(visual_tokens=(rows, columns)))
        for rows, columns in budgets
    }
    for reducer, (rows, columns) in product(REDUCERS if arm == "mlp" else (), BUDGETS):
        options = Options(reducer={"reducer_type": reducer, "keep": rows * columns})
        result["right"][f"{rows * columns}, {reducer}"] = ask(answering, processor, out, work, options)
    write_whole(path, json.dumps(result))
    shutil.rmtree(work)
    return result


def drop_features(module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Drops some of the patches' channels in training, the same share for every projector."""
    return F.dropout(arguments[0], DROPOUT, module.training), *arguments[1:]


def ask(model: Any, processor: Any, out: Path, work: Path, options: Options) -> dict[str, str]:
    """Which questions of each task a model answers right, as a string of 1 and 0."""
    folder = (
        work / f"answers {options.visual_tokens} {options.reducer and ' '.join(map(str, options.reducer.values()))}"
    )
    evaluate((model, processor), [str(out / "suite")], folder, options)
    rows = {task: (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines() for task in TASKS}
    return {task: "".join(str(int(json.loads(row)["score"])) for row in lines) for task, lines in rows.items()}


def collected(results: list[dict[str, Any]]) -> dict[str, Any]:
    """All results, compactly, as stored."""
    return {"torch": torch.__version__, "runs": sorted(results, key=lambda row: (row["arm"], row["seed"]))}


def table(stored: dict[str, Any], budget: str) -> str:
    """Accuracy by projector and task at a budget, and our lead over each in the mean of tasks, as Markdown."""
    runs = stored["runs"]
    rows = [(arm, arm, budget) for arm in ARMS] + [(f"mlp, {name}", "mlp", f"{budget}, {name}") for name in REDUCERS]
    rows = [("mlp, all 256 patches", "mlp", "256"), *rows]
    lines = [
        "| projector | name, first | names of a scene | " + " | ".join(TASKS) + " | mean | ms_resampler's lead | time |"
    ]
    lines.append("|" + "---|" * (len(TASKS) + 6))
    ours_STQ = right_of(runs, OURS, budget)
    cost = np.mean([row["seconds"] for row in runs if row["arm"] == OURS])
    for label, arm, key in rows:
        of_arm = [row for row in runs if row["arm"] == arm and key in row["right"]]
        if not of_arm:
            continue
        right_STQ = right_of(of_arm, arm, key)
        names = [[row["names"][key][kind] for row in of_arm] for kind in NAMES if key in of_arm[0]["names"]]
        said = [f"{np.mean(found):.1f}" for found in names] or ["", ""]
        means = [f"{mean:.1f}" for mean in (*(100 * right_STQ.mean(axis=(0, 2))), 100 * right_STQ.mean())]
        lead = "" if arm == OURS else lead_text(ours_STQ - right_STQ)
        time_ratio = np.mean([row["seconds"] for row in of_arm]) / cost
        lines.append(f"| {' | '.join([label, *said, *means, lead, f'{time_ratio:.2f}'])} |")
    return "\n".join(lines)


def right_of(runs: list[dict[str, Any]], arm: str, budget: str) -> np.ndarray:
    """1 where an answer is right, by seed, task and question."""
    rows = sorted((row for row in runs if row["arm"] == arm), key=lambda row: row["seed"])
    return np.array([[[int(mark) for mark in row["right"][budget][task]] for task in TASKS] for row in rows])


def lead_text(difference_STQ: np.ndarray) -> str:
    """The mean difference in percentage points and its 95% interval, over resampled seeds and questions."""
    rng, (seeds, _, questions) = np.random.default_rng(0), difference_STQ.shape
    means = [
        difference_STQ[rng.integers(seeds, size=seeds)][:, :, rng.integers(questions, size=questions)].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{100 * difference_STQ.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def main() -> None:
    """Makes what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--steps", type=int, default=300, help="of the words stage, of 32 scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=100, help="of every task")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.questions)
    (arguments.out / "results").mkdir(exist_ok=True)
    results = []
    with worker_pool(arguments.workers) as pool:
        plan = [(arm, seed) for seed in range(arguments.seeds) for arm in ARMS]
        futures = [pool.submit(run, arguments.out, arm, seed, arguments.steps) for arm, seed in plan]
        for done, future in enumerate(as_completed(futures), start=1):
            results.append(future.result())
            print(f"{done}/{len(plan)} {results[-1]['arm']}, seed {results[-1]['seed']}", flush=True)
    write_whole(STORED, json.dumps(collected(results)) + "\n")
    for budget in ("36", "16"):
        print(f"\n{budget} visual tokens\n\n{table(collected(results), budget)}")


if __name__ == "__main__":
    main()
