"""transformers' Trainer with atomic checkpoints, a learning rate for each part, and a check of every loss."""

import ctypes
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from ..progress import progress
from .parameters import eval_frozen, frozen_parts, parameter_groups
from .recipes import LearningRates

UNFINISHED = "unfinished"  # the folder in which a checkpoint is written


class JsonlLog(TrainerCallback):
    """Appends every log of the Trainer to a file, one JSON object a line.

    `epochs` is the number of passes through the data in the Trainer's single epoch; None omits epochs.
    """

    def __init__(self, path: Path, epochs: float | None = 1.0):
        self.path = path
        self.epochs = epochs

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            row = {"step": state.global_step, **(logs or {})}
            epoch = row.pop("epoch", None)
            if epoch is not None and self.epochs is not None:
                row["epoch"] = epoch * self.epochs
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class ProgressLines(TrainerCallback):
    """A run's steps, where stderr is not a terminal, for which the Trainer has a bar."""

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self.lines = progress(
            total=state.max_steps,
            initial=state.global_step,
            desc="training steps",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.lines.update()


class CheckedTrainer(Trainer):
    """A Trainer with atomic checkpoints, which stops at the first loss that is not finite.

    `rates` None uses the Trainer's own optimiser groups.
    """

    def __init__(self, *args: Any, rates: LearningRates | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rates = rates
        self.frozen = frozen_parts(self.model)
        self.ids_of_step: list[str] = []
        if self.is_fsdp_enabled and self.args.bf16:  # otherwise gradients are accumulated in bfloat16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, with a learning rate for each part of the model."""
        if self.rates is not None and getattr(self, "optimizer", None) is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(model or self.model, self.rates, self.args.weight_decay)
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Loss and backward pass of a batch. Raises ValueError if the loss is not finite."""
        self.ids_of_step += inputs.pop("record_ids", [])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._stop_unless_finite(loss, "loss")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, with frozen parts in evaluation mode; 0 for a step whose records are all bad."""
        eval_frozen(self.frozen)
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None:  # DeepSpeed clips on its own
            self._stop_unless_finite(norm, "gradient")
        self.ids_of_step = []
        return norm

    def _stop_unless_finite(self, value: torch.Tensor | float, what: str) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"The {what} of step {self.state.global_step + 1} is not finite ({float(value)}); its records: "
                f"{', '.join(self.ids_of_step) or 'unnamed'}. The last checkpoint is from before it: look at these "
                "records, or lower the learning rate."
            )

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / UNFINISHED)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # This would be a pickle of all arguments, which may hold a Hub token; the record has the rest.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint under another name, and renames it when it is complete on the disk."""
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        unfinished = folder / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(f"The checkpoint of step {self.state.global_step}", unfinished):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sync(unfinished)
            shutil.rmtree(folder / name, ignore_errors=True)
            (unfinished / name).rename(folder / name)
            unfinished.rmdir()
            rotate_checkpoints(str(folder), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


@contextmanager
def writing(what: str, unfinished: Path) -> Iterator[None]:
    """Removes the folder `unfinished` if it cannot be written, for example on a full disk, and raises OSError."""
    try:
        yield
    except Exception as error:  # torch and safetensors raise errors of their own types
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OSError(
            f"{what} could not be written ({reason}). The last complete checkpoint is "
            f"{last_checkpoint(unfinished.parent) or 'none'}: make room, then run the same command."
        ) from error


def sync(folder: Path) -> None:
    """Waits until the files of a folder are on the disk, so that renaming never precedes their contents."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint: the Trainer writes its state last."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32; a CPU without the instructions emulates it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for reuse; page faults would take most of the time of a CPU run."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt's options in <malloc.h>
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
                libc.mallopt(option, value)
