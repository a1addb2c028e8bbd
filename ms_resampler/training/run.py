"""`train`: trains a model on data, and writes OUT/model (or OUT/adapter) and the run's record."""

import importlib.util
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from ..folders import our_model
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..tiles_ms_resampler import grids_of
from .adapters import four_bit_config
from .collate import BatchMaker, ConversationCollator, errors_of_workers, mend_template
from .feature_cache import cache_features
from .journal import Journal, open_journal
from .order import Schedule, StreamSchedule, check_budgets
from .parameters import count_parameters, prepare, set_precision
from .recipes import Recipe, rates_text, recipe_named
from .records import StreamedRecords, open_records
from .trainer import CheckedTrainer, JsonlLog, ProgressLines, keep_freed_memory, last_checkpoint, sync, writing
from .words import SayingWords, WordsCollator, learner_of


def train(
    recipe: Recipe | str,
    *,
    model: str | Path,
    data: str | Path,
    images: str | Path | None = None,
    out: str | Path | None = None,
    split: str = "train",
    streaming: bool = False,
    device_batch: int | None = None,
    features: str | Path | None = None,
    report_to: str = "none",
) -> Path:
    """Trains a model on conversations, or resumes an interrupted run in `out`.

    `recipe` is a Recipe or the name of one, `model` a folder or Hub name, `data` what `open_records` opens (with
    `images`, `split` and `streaming`), `out` the folder of the run (default: runs/RECIPE NAME), `device_batch`
    the records on a device at a time, `features` a folder for the features of a frozen tower, which are computed once,
    `report_to` "none", "tensorboard" or "trackio". Launched by accelerate, every process calls it.

    Returns the folder of the result: `out`/model, or `out`/adapter for a recipe with adapters. Raises ValueError if
    the recipe does not fit the model, the data or the hardware, or if `out` holds a different run.
    """
    recipe = recipe_named(recipe)
    check_packages(recipe, report_to)
    model, data, out = our_model(model), str(data), Path(out or Path("runs") / recipe.name)
    result = out / ("adapter" if recipe.adapters else "model")
    processor = AutoProcessor.from_pretrained(model)
    if recipe.tiles is not None:
        grids_of(recipe.tiles)  # raises for what is none
        processor.tiles = recipe.tiles
    note = mend_template(processor) if recipe.text == "chat" else None
    if streaming:
        recipe = replace(recipe, group_by_modality=False)
    device_batch, accumulation = share_batch(recipe, process_count(), device_batch)
    records = open_records(data, images, split, streaming)
    if isinstance(records, StreamedRecords):
        schedule: Schedule = StreamSchedule(records, recipe, process_count(), device_batch)
    else:
        schedule = Schedule(records, recipe)
    # before the model is loaded: ZeRO-3 shards it as it loads
    arguments = training_arguments(recipe, out, schedule.steps, device_batch, accumulation, report_to)
    writes = is_main_process()
    journal = open_journal(recipe, model=model, data=data, split=split, schedule=schedule, out=out, writes=writes)
    if result.exists():
        return result
    learner, dtype = load_model(recipe, model)
    check_budgets(recipe, learner.config)
    whole = learner
    if recipe.text == "words":
        learner = learner_of(whole, recipe.adapters is not None)
    use_cache = getattr(learner.config, "use_cache", None)
    journal.note(parameters=count_parameters(learner))
    notes = [note] if note else []
    if features is not None:
        cached = cache_features(learner, Path(features), recipe)
        count = None if isinstance(records, StreamedRecords) else int(records.modality.sum())
        notes.append(cached.notice(count))
    keep_freed_memory()
    collator: Any = partial(
        ConversationCollator,
        max_length=recipe.max_length,
        plain=recipe.text == "plain",
        truncate=recipe.truncate,
    )
    if recipe.text == "words":
        collator = partial(WordsCollator, visual_words=whole.config.visual_words)
    trainer = CheckedTrainer(
        model=learner,
        rates=recipe.rates,
        args=arguments,
        train_dataset=schedule,
        data_collator=BatchMaker(collator, processor, recipe.bad_records, out),
        processing_class=processor,
        callbacks=[JsonlLog(out / "log.jsonl", schedule.epochs)],
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressLines())
    if writes:
        print(summary(recipe, schedule, last_checkpoint(out)), *notes, sep="\n")
    learner.config.use_cache = use_cache  # the Trainer switches it off, which would be saved
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise ValueError("FSDP needs accelerators, and accelerate finds none: launch with ddp.")
    with errors_of_workers():
        trainer.train(resume_from_checkpoint=last_checkpoint(out))
    journal.finish(trainer)
    save_result(trainer, whole, dtype, journal, result)
    if writes:
        print("".join(f"{sentence}\n" for sentence in journal.left_out()), end="")
    return result


def process_count() -> int:
    """The number of processes that train together, one per device."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", 0)) == 0


def summary(recipe: Recipe, schedule: Schedule, checkpoint: str | None) -> str:
    """A summary of the run, in one or two lines."""
    size = f"{schedule.steps:,} steps of {recipe.batch_size} records, {schedule}"
    lines = [f"{recipe.name}: {size}; learning rates: {rates_text(recipe.rates)}.", *schedule.notes()]
    return "\n".join([*lines, f"Resuming from {checkpoint}."] if checkpoint else lines)


def training_arguments(
    recipe: Recipe, out: Path, steps: int, device_batch: int, accumulation: int, report_to: str
) -> TrainingArguments:
    """The recipe as TrainingArguments. Raises ValueError if one process would leave GPUs idle."""
    on_gpu = torch.cuda.is_available()
    if process_count() == 1 and torch.cuda.device_count() > 1:
        raise ValueError(
            f"There are {torch.cuda.device_count()} GPUs here: start the run through `accelerate launch` to use all of "
            "them, or set CUDA_VISIBLE_DEVICES=0 to use one."
        )
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=device_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=max(filter(None, vars(recipe.rates).values())),
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        warmup_steps=recipe.warmup_ratio,
        lr_scheduler_type="cosine",
        bf16=recipe.bf16,
        activation_checkpointing=recipe.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=recipe.rates.tower is not None,  # layers after the last one that is read
        use_cpu=not on_gpu,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",  # the schedule is shuffled already
        remove_unused_columns=False,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.kept_checkpoints,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # the trainer stops there
        report_to=report_to,
        disable_tqdm=not sys.stderr.isatty(),
        project="ms-resampler",
        trackio_static_space_id=False,  # trackio stays local
        seed=recipe.seed,
    )


def share_batch(recipe: Recipe, devices: int, device_batch: int | None) -> tuple[int, int]:
    """Records per device at a time, and accumulation steps, so that a step has `recipe.batch_size` records.

    Raises ValueError if they cannot be divided evenly.
    """
    share, rest = divmod(recipe.batch_size, devices)
    if rest:
        raise ValueError(f"A batch of {recipe.batch_size} cannot be shared among {devices} devices: use a multiple.")
    if device_batch is None:
        device_batch = max(size for size in range(1, recipe.largest_device_batch + 1) if share % size == 0)
    if device_batch < 1 or share % device_batch:
        raise ValueError(
            f"{devices} devices take {share} of the {recipe.batch_size} records of a step each, which "
            f"{device_batch} at a time do not add up to: use a divisor of {share}."
        )
    return device_batch, share // device_batch


def check_packages(recipe: Recipe, report_to: str) -> None:
    """Raises ValueError if a package that was asked for is missing."""
    wanted = {"peft": recipe.adapters is not None, "liger_kernel": recipe.liger, "bitsandbytes": recipe.four_bits}
    wanted[report_to] = report_to != "none"
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"This run needs the package {package}: pip install {package.replace('_', '-')}.")


def load_model(recipe: Recipe, folder: str) -> tuple[Any, torch.dtype]:
    """The model, prepared for the recipe, and its stored dtype.

    Raises ValueError if weights are missing.
    """
    model, report = MSResamplerForConditionalGeneration.from_pretrained(
        folder,
        dtype="auto",
        quantization_config=four_bit_config(recipe.bf16) if recipe.four_bits else None,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise ValueError(f"{folder} has no weights for {', '.join(sorted(report['missing_keys'])[:3])}, ...")
    dtype = model.dtype
    model = prepare(model, recipe)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # which keeps its own float32 copies
        set_precision(model, torch.bfloat16 if recipe.bf16 else torch.float32)
    return model, dtype


def save_result(trainer: CheckedTrainer, whole: Any, dtype: torch.dtype, journal: Journal, target: Path) -> None:
    """Writes weights, processor, code and record atomically; all processes take part, one writes.

    `whole` is the model, if only some of its parts were in the trainer.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, SayingWords):
        state, trained = whole.state_dict() | state, whole
    if trainer.args.should_save:
        unfinished = target.with_name(f"{target.name}.unfinished")
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        with writing("The result", unfinished):
            save_weights(trained, state, dtype, unfinished)
            trainer.processing_class.save_pretrained(unfinished)
            journal.write(unfinished / "training_record.json")
            sync(unfinished)
        unfinished.rename(target)
    trainer.accelerator.wait_for_everyone()


def save_weights(trained: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """Saves adapters, or a whole model by means of one without weights, because FSDP replaces its class."""
    if hasattr(trained, "peft_config"):
        trained.save_pretrained(folder, state_dict=state)
        (folder / "README.md").unlink()  # the model's structure without weights
        return
    unset_hf_deepspeed_config()  # ZeRO-3 would shard it, and wait for the other processes
    with torch.device("meta"):
        shell = MSResamplerForConditionalGeneration(trained.config).to(dtype)
    shell.generation_config = trained.generation_config
    if trained.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    shell.save_pretrained(folder, state_dict=state)
