"""The small model's training: pictures, features, words, talk, and what the result can do."""

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from ..evaluation.run import Options, evaluate
from ..folders import PROJECTOR, RECORD, whole_folder, write_whole
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..pictures.packages import DEBIAN, PACKAGES
from ..pictures.sources import Shelf
from ..pictures.suite import PACKAGE_FOLDER
from ..processing_ms_resampler import MSResamplerProcessor
from ..tiny.stages import Stage, read_log, run_stage
from ..training.merge import merge
from ..training.recipes import Adapters, LearningRates, Recipe
from ..training.run import train
from ..training.trainer import fast_bfloat16, keep_freed_memory
from .card import write_small_card
from .features import Features
from .parts import ADAPTER, LLM, TOWER, TRAINED, start_small, things
from .plain import answers_of, right_answers
from .scenes import Painter, find_drawings
from .talk import PLAIN, TASKS, write_conversations, write_suite
from .words import CellsCollator, CellsOfScenes, SayingCells, add_dropout, say_the_towers_classes, score_names

SCENES = 16_000  # that the words stage learns from
TALKS = 2000  # conversations
NAMED = 1000  # scenes of each held-out split whose tokens' names are scored


def small_words(features: Features, steps: int, seed: int, grid: tuple[int, int] | None = None) -> Stage:
    """Trains the projector to say what is at each place, on several token grids or on one."""
    return Stage(
        name="words",
        dataset=lambda records: CellsOfScenes(features, records, 32, seed, grid),
        collator=lambda _: CellsCollator(features),
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=min(30, steps),
        cooldown_steps=int(0.7 * steps),
        weight_decay=0.05,
        save_steps=200,
        seed=seed,
    )


def small_talk(seed: int) -> Recipe:
    """Trains adapters to answer from the words; tower and projector stay frozen."""
    return Recipe(
        name="talk",
        source="the small model",
        rates=LearningRates(llm=5e-4),
        batch_size=8,
        adapters=Adapters(rank=8, alpha=16, dropout=0.0),
        max_length=768,
        token_budgets=((6, 6), (6, 6), (4, 4)),
        adam_beta2=0.98,
        bf16=fast_bfloat16(),
        activation_checkpointing=False,
        largest_device_batch=8,
        save_steps=50,
        workers=1,
        seed=seed,
    )


def train_small(
    out: str | Path = "runs/small",
    *,
    scenes: int = SCENES,
    talks: int = TALKS,
    steps: int | None = None,
    questions: int = 150,
    seed: int = 0,
    embed: bool = False,
) -> Path:
    """Trains the small model's projector and adapters, or resumes an interrupted run in `out`.

    The words stage takes `steps` steps (default: 1.5 times through the scenes); the result, and the same model without
    pictures, answer `questions` questions of every task. `embed` copies the result into this package. Returns the
    folder of the model, `out`/model.
    """
    keep_freed_memory()
    out, steps = Path(out), steps or round(1.5 * scenes / 32)
    shelf, known = Shelf(PACKAGE_FOLDER), PACKAGES | DEBIAN
    drawings = find_drawings(shelf)
    painters = {split: Painter(found, split) for split, found in drawings.items()}
    if not (out / "start").is_dir():
        learn_words(out, painters["train"], scenes, steps, seed)
    plain = answers_of(out / "start", PLAIN["train"], out / "plain.json")
    if not (out / "talk" / "adapter").is_dir():
        data = write_conversations(out / "conversations", painters["train"], talks, plain)
        train(small_talk(seed), model=out / "start", data=data, images=data.parent, out=out / "talk")
    if not (out / "model").is_dir():
        merge(out / "talk", out / "model")
    for split in ("validation", "test-style"):
        if not (out / "suite" / split).is_dir():
            write_suite(out / "suite" / split, painters[split], questions)
    record = {
        "stages": [words_row(out, scenes, steps, seed), talk_row(out, talks)],
        "pretrained": [vars(TOWER), vars(LLM)],
        "pictures": {
            "packages": {name: f"{known[name].version} ({known[name].licence})" for name in sorted(shelf.used)},
            "drawings": {split: sum(map(len, found.values())) for split, found in drawings.items()},
            "nouns": len(things()),
        },
        "names": measure_names(out, painters),
        "results": measure(out, questions),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    write_whole(out / "model" / RECORD, json.dumps(record, indent=1) + "\n")
    write_small_card(out / "model")
    if embed:
        embed_small(out)
    return out / "model"


def learn_words(out: Path, painter: Painter, scenes: int, steps: int, seed: int) -> None:
    """The features and words stages: writes the model with the trained projector to `out`/start."""
    assembled = start_small(seed=seed)
    model, projector = assembled.model, assembled.model.model.projector
    features = Features(out / "features" / "train", painter, scenes)
    features.compute(model, assembled.processor.image_processor)
    saying = SayingCells(model)
    say_the_towers_classes(projector, saying.table_WT)
    handles = add_dropout(projector)
    run_stage(small_words(features, steps, seed), saying, assembled.processor, out / "words")
    for handle in handles:
        handle.remove()
    projector.requires_grad_(True)
    with whole_folder(out / "start") as folder:
        model.save_pretrained(folder)
        assembled.processor.save_pretrained(folder)


def measure_names(out: Path, painters: dict[str, Painter]) -> dict[str, dict[str, float]]:
    """Which nouns the visual tokens say, in percent, by split and number of tokens."""
    path = out / "results" / "names.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        model = MSResamplerForConditionalGeneration.from_pretrained(out / "start", dtype="auto").eval()
        processor = MSResamplerProcessor.from_pretrained(out / "start")
        scores = {}
        for split in ("validation", "test-style"):
            features = Features(out / "features" / split, painters[split], NAMED)
            features.compute(model, processor.image_processor)
            for grid in ((6, 6), (4, 4)):
                name = f"{split}, {grid[0] * grid[1]} tokens"
                scores[name] = score_names(SayingCells(model), features, grid)
        write_whole(path, json.dumps(scores))
    return json.loads(path.read_text(encoding="utf-8"))


def measure(out: Path, questions: int) -> dict[str, Any]:
    """Scores of the suites by split, with pictures and without, and of plain questions beside the base model."""
    results: dict[str, Any] = {}
    for name, split, options in (
        ("validation", "validation", Options()),
        ("test-style", "test-style", Options()),
        ("test-style, 16 tokens", "test-style", Options(visual_tokens=16)),
        ("test-style, blind", "test-style", Options(blind=True)),
    ):
        folder = out / "results" / name.replace(", ", "-").replace(" ", "-")
        summary = evaluate(str(out / "model"), [str(out / "suite" / split)], folder, options)
        kept = ("value", "interval", "numbers", "samples", "not_parsed", "seconds_per_question")
        results[name] = {task: {key: summary["tasks"][task][key] for key in kept} for task in TASKS}
    results["plain questions"] = {
        "base": right_answers(out / "start", PLAIN["test"], out / "results" / "plain_base.json"),
        "small": right_answers(out / "model", PLAIN["test"], out / "results" / "plain_small.json"),
    }
    return results


def words_row(out: Path, scenes: int, steps: int, seed: int) -> dict[str, Any]:
    """The words stage in the record."""
    numbers = {"scenes": scenes, "steps": steps, "batch_size": 32, "learning_rate": 1e-3, "seed": seed}
    rows = read_log(out / "words")
    times = [row["train_runtime"] for row in rows if "train_runtime" in row]
    losses = [row["loss"] for row in rows if "loss" in row]
    return {"name": "words", **numbers, "seconds": max(times), "last_loss": losses[-1]}


def talk_row(out: Path, talks: int) -> dict[str, Any]:
    """The talk stage in the record."""
    run = json.loads((out / "talk" / "record.json").read_text())
    numbers = {name: run["recipe"][name] for name in ("batch_size", "adapters", "token_budgets", "seed")}
    result = {"steps": run["steps"], "seconds": run["last_session_seconds"], "last_loss": run["last_loss"]}
    return {"name": "talk", "conversations": talks, **numbers, "learning_rate": run["recipe"]["rates"]["llm"], **result}


def embed_small(out: Path) -> None:
    """Copies projector (from `start`), adapters and record into this package, in half precision."""
    TRAINED.mkdir(parents=True, exist_ok=True)
    model = load_file(out / "start" / "model.safetensors")
    prefix = "model.projector."
    parts = {name.removeprefix(prefix): value for name, value in model.items() if name.startswith(prefix)}
    save_half(parts, TRAINED / PROJECTOR)
    adapter = out / "talk" / "adapter"
    save_half(load_file(adapter / ADAPTER), TRAINED / ADAPTER)
    shutil.copyfile(adapter / "adapter_config.json", TRAINED / "adapter_config.json")
    for name in (RECORD, "README.md"):
        shutil.copyfile(out / "model" / name, TRAINED / name)


def save_half(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes tensors in float16; numbers of the prior stay in float32, of which 1e30 has no half."""
    halves = {name: value if value.abs().max() > 6e4 else value.half() for name, value in tensors.items()}
    save_file(halves, path, metadata={"format": "pt"})
