"""The embedded checkpoint's training: its stages, and the run that trains, evaluates and records it."""

import dataclasses
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoTokenizer, TrainingArguments

from .. import TINY
from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import RECORD, WEIGHTS
from ..hub_upload.card import results_table, write_card
from ..hub_upload.staging import allowed_files
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..training.collate import ConversationCollator
from ..training.trainer import CheckedTrainer, JsonlLog, fast_bfloat16, keep_freed_memory, last_checkpoint
from .curriculum import (
    BATCH,
    COUNTING,
    BudgetCollator,
    Imitating,
    Looking,
    PlacesCollator,
    SceneConversations,
    ScenePlaces,
)
from .evaluate import BudgetScore, FamilyScore, evaluate_budgets, evaluate_scenes, evaluate_wordings
from .known import known_inputs
from .model import assemble_tiny
from .scenes import COLOURS, SHAPES, WORDS

Row = TypeVar("Row", bound=FamilyScore | BudgetScore)


@dataclass(frozen=True)
class Stage:
    """A stage of the embedded checkpoint's training; `dataclasses.replace` changes fields.

    `dataset(records)` returns that many training records, `collator(processor)` makes batches. The learning rate rises
    over `warmup_steps`, stays constant, and falls to zero over the last `cooldown_steps`.
    """

    name: str
    dataset: Callable[[int], Dataset]
    collator: Callable[[Any], Callable]
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    cooldown_steps: int
    weight_decay: float = 0.02
    save_steps: int = 100
    workers: int = 1
    seed: int = 0


def tiny_look(steps: int = 700) -> Stage:
    """Trains tower and projector from random weights to recognise what is at each place."""
    return Stage(
        name="look",
        dataset=ScenePlaces,
        collator=PlacesCollator,
        steps=steps,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=min(50, steps),
        cooldown_steps=steps // 2,
    )


def tiny_imitate(steps: int = 500) -> Stage:
    """Trains a new projector to make the tokens of another one, from the same tower."""
    return dataclasses.replace(tiny_look(steps), name="imitate")


def tiny_read(steps: int = 2400) -> Stage:
    """Trains the whole model to transcribe and index scenes, then to answer questions about them."""
    drills = min(600, steps // 3) * BATCH
    return Stage(
        name="read",
        dataset=lambda records: SceneConversations(records, drills, turns=10),
        collator=lambda processor: ConversationCollator(processor, max_length=1024),
        steps=steps,
        batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=min(100, steps),
        cooldown_steps=int(0.4 * steps),
    )


def tiny_talk(steps: int = 800) -> Stage:
    """Trains the whole model to answer at any number of visual tokens, however it is asked."""
    return Stage(
        name="talk",
        dataset=lambda records: SceneConversations(records, drills=0, turns=10, varied=True),
        collator=lambda processor: BudgetCollator(processor, max_length=1024),
        steps=steps,
        batch_size=BATCH,
        learning_rate=6e-4,
        warmup_steps=min(50, steps),
        cooldown_steps=int(0.6 * steps),
    )


def tiny_count(steps: int = 250) -> Stage:
    """Trains as before, with other scenes, and asks more often how many things there are."""
    talk = tiny_talk()
    first = talk.steps * talk.batch_size
    return dataclasses.replace(
        tiny_talk(steps),
        name="count",
        dataset=lambda records: SceneConversations(records, 0, turns=10, often=COUNTING, first=first, varied=True),
        learning_rate=3e-4,
        warmup_steps=min(20, steps),
        cooldown_steps=int(0.9 * steps),
    )


def tiny_blind(steps: int = 600) -> Stage:
    """The same language model trained without images, which shows what guessing achieves."""
    return Stage(
        name="blind",
        dataset=lambda records: SceneConversations(records, drills=0, turns=10, blind=True),
        collator=lambda processor: ConversationCollator(processor, max_length=1024),
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=min(50, steps),
        cooldown_steps=steps // 2,
    )


def train_tiny(
    out: str | Path = "runs/tiny",
    *,
    start: str | Path | None = None,
    steps: int | None = None,
    scenes: int = 400,
    seed: int = 0,
    embed: bool = False,
) -> Path:
    """Trains the embedded checkpoint from random weights, or resumes an interrupted run in `out`.

    `start` is a folder with an earlier version of it: tower and language model start from there, the projector by
    imitating that of the folder, and the scores without images are those of its record. A stage has at most `steps`
    steps. The result, and a model trained without images, are evaluated on `scenes` held-out scenes. `embed` copies
    the result into this package. Returns the folder of the result, `out`/model. Raises ValueError if the folder's
    tower, language model or tokenizer are others.
    """
    check_numbers(steps=steps, scenes=scenes)
    out, start = Path(out), None if start is None else Path(start)
    imitate, look, read, talk, count, blind = (
        stage_of(make, steps, seed) for make in (tiny_imitate, tiny_look, tiny_read, tiny_talk, tiny_count, tiny_blind)
    )
    target = out / "model"

    model, processor = assemble_tiny(seed)
    if start is None:
        stages = [look, read, talk, count, blind]
        run_stage(look, Looking(model.model), processor, out / "look")
        run_stage(read, model, processor, out / "read")
    else:
        stages = [imitate, talk, count]
        run_stage(imitate, Imitating(model.model, parts_of(start, model, processor)), processor, out / "imitate")
        model.requires_grad_(True)
    run_stage(talk, model, processor, out / "talk")
    run_stage(count, model, processor, out / "count")
    model.save_pretrained(target)
    processor.save_pretrained(target)
    scores = evaluate_once(out / "scores.json", FamilyScore, lambda: evaluate_scenes(model, processor, scenes=scenes))
    some = max(1, scenes // 4)
    budgets = evaluate_once(
        out / "budget_scores.json", BudgetScore, lambda: evaluate_budgets(model, processor, scenes=some)
    )
    wordings = evaluate_once(
        out / "wording_scores.json", FamilyScore, lambda: evaluate_wordings(model, processor, scenes=some)
    )

    origin: dict[str, Any] = {}
    if start is None:
        guesser, _ = assemble_tiny(seed)
        run_stage(blind, guesser, processor, out / "blind")
        blind_scores = evaluate_once(
            out / "blind_scores.json",
            FamilyScore,
            lambda: evaluate_scenes(guesser, processor, scenes=scenes, blind=True),
        )
    else:
        earlier = json.loads((start / RECORD).read_text())
        blind_scores = [FamilyScore(**row) for row in earlier["blind_scores"]]  # the questions are the same
        origin["start"] = {"sha256": file_hash(start / WEIGHTS), "stages": earlier["stages"]}

    record = training_record(stages, model, out, scores, blind_scores) | origin
    record |= {
        name: [dataclasses.asdict(row) for row in rows]
        for name, rows in (("budget_scores", budgets), ("wording_scores", wordings))
    }
    record["known_inputs"] = known_inputs(model, processor, talk.dataset(talk.steps * talk.batch_size), target)
    (target / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    plot_curves(out, [stage.name for stage in stages], target / "curves.png")
    write_card(target, "MS-Resampler tiny")
    print(results_table(record))
    if embed:
        put_into_package(target)
    return target


def parts_of(start: str | Path, model: Any, processor: Any) -> nn.Module:
    """Gives `model` the tower and the language model of a folder, and returns the folder's projector.

    Raises ValueError if they do not fit.
    """
    config = MSResamplerConfig.from_pretrained(start)
    for part in ("vision_config", "text_config"):
        theirs, ours = (getattr(one, part).to_dict() | {"dtype": None} for one in (config, model.config))
        if theirs != ours:
            raise ValueError(
                f"{start} has another {part} than the embedded checkpoint, and training cannot start there."
            )
    if AutoTokenizer.from_pretrained(start).get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(
            f"{start} has another tokenizer than the embedded checkpoint, and training cannot start there."
        )
    earlier = MSResamplerForConditionalGeneration.from_pretrained(start)
    for part in ("vision_tower", "language_model"):
        getattr(model.model, part).load_state_dict(getattr(earlier.model, part).state_dict())
    return earlier.model.projector


def check_numbers(**numbers: int | None) -> None:
    """Raises ValueError for a number below 1; None is ignored."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"The number of {name} must be at least 1, got {value}.")


def stage_of(make: Callable[..., Stage], steps: int | None, seed: int) -> Stage:
    """A stage with a seed and at most `steps` steps."""
    stage = make() if steps is None else make(min(make().steps, steps))
    return dataclasses.replace(stage, seed=seed)


def run_stage(stage: Stage, model: nn.Module, processor: Any, folder: Path) -> None:
    """Trains `model` in place with a stage, in `folder`; resumes from the last checkpoint there, if any."""
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    trainer = CheckedTrainer(
        model=model,
        args=training_arguments(stage, folder),
        train_dataset=stage.dataset(stage.steps * stage.batch_size),
        data_collator=stage.collator(processor),
        processing_class=processor,
        callbacks=[JsonlLog(folder / "log.jsonl")],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def training_arguments(stage: Stage, folder: Path) -> TrainingArguments:
    """The stage as TrainingArguments."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_beta2=0.98,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": stage.cooldown_steps},
        bf16=fast_bfloat16(),
        use_cpu=not on_gpu,
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",  # the order of the records is the curriculum
        remove_unused_columns=False,
        save_steps=stage.save_steps,
        save_total_limit=2,
        logging_steps=25,
        report_to="none",
        seed=stage.seed,
    )


def evaluate_once(path: Path, row: type[Row], evaluate: Callable[[], list[Row]]) -> list[Row]:
    """Evaluates, or reads the rows of an earlier run from `path`."""
    if not path.exists():
        print(f"{path.stem.replace('_', ' ')} on held-out scenes:")
        path.write_text(json.dumps([dataclasses.asdict(found) for found in evaluate()], indent=2))
    return [row(**found) for found in json.loads(path.read_text())]


def training_record(
    stages: Sequence[Stage],
    model: Any,
    folder: Path,
    scores: list[FamilyScore],
    blind_scores: list[FamilyScore],
) -> dict[str, Any]:
    """Stages, data, versions, time and results, as plain JSON values."""
    return {
        "stages": [describe_stage(stage, folder / stage.name) for stage in stages],
        "parameters": {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in model.model.named_children()
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "scores": [dataclasses.asdict(row) for row in scores],
        "blind_scores": [dataclasses.asdict(row) for row in blind_scores],
        "vocabulary": {"shapes": list(SHAPES), "words": list(WORDS), "colours": list(COLOURS)},
    }


def describe_stage(stage: Stage, folder: Path) -> dict[str, Any]:
    """The stage's numbers, a fingerprint of its data, and the seconds of its longest uninterrupted stretch."""
    numbers = {name: value for name, value in vars(stage).items() if not callable(value)}
    seconds = [row["train_runtime"] for row in read_log(folder) if "train_runtime" in row]
    return {
        **numbers,
        "data_sha256": data_hash(stage.dataset(stage.steps * stage.batch_size)),
        "seconds": max(seconds, default=None),
    }


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_hash(dataset: Any, samples: int = 64) -> str:
    """A fingerprint of the training data: SHA-256 over evenly spaced records, pictures included."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    for index in range(0, len(dataset), max(1, len(dataset) // samples)):
        record = dataset[index]
        image = record.pop("image")
        pictures = image if isinstance(image, list) else [image] if image else []
        digest.update(json.dumps(record).encode() + b"".join(picture.tobytes() for picture in pictures))
    return digest.hexdigest()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log.jsonl; of a step that was logged again after resuming, the last row."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row for row in rows if "loss" in row}
    return [*losses.values(), *(row for row in rows if "loss" not in row)]


def plot_curves(folder: Path, stages: Sequence[str], path: Path) -> None:
    """Plots the loss of every stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, colour in zip(stages, ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999"), strict=False):
        rows = [row for row in read_log(folder / name) if "loss" in row]
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=colour, label=name)
    axes.set(xlabel="optimiser step", ylabel="loss (nats)", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def put_into_package(folder: Path) -> None:
    """Replaces the embedded checkpoint; its code is in the package, one folder up."""
    old = Path(TINY)
    fresh = old.with_name("tiny.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file in allowed_files(folder):
        shutil.copyfile(file, fresh / file.name)
    shutil.rmtree(old, ignore_errors=True)
    fresh.rename(old)
