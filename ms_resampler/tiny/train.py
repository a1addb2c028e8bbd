"""A stage of the embedded checkpoint's training, and what every training run shares."""

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..training.recipes import Stage
from ..training.trainer import CheckedTrainer, JsonlLog, last_checkpoint


def train(stage: Stage, model: nn.Module, processor: Any, folder: Path) -> None:
    """Trains `model` in place by a stage, in `folder`; goes on from the last checkpoint there, if there is one."""
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
    """The stage in the Trainer's words."""
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
        bf16=on_gpu or "AVX512" in torch.backends.cpu.get_cpu_capability(),  # elsewhere it is 30 times slower
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


def keep_freed_memory() -> None:
    """Asks glibc to keep freed memory for reuse; page faults otherwise cost a CPU run most of its time."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt's options in <malloc.h>
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
                libc.mallopt(option, value)


def data_hash(dataset: Any, samples: int = 64) -> str:
    """A fingerprint of the training data: SHA-256 over evenly spaced records, pictures included."""
    digest = hashlib.sha256(str(len(dataset)).encode())
    for index in range(0, len(dataset), max(1, len(dataset) // samples)):
        record = dataset[index]
        image = record.pop("image")
        digest.update(json.dumps(record).encode() + (image.tobytes() if image else b""))
    return digest.hexdigest()
