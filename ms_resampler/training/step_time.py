"""Times a few training steps with random weights, and measures their peak memory."""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from .adapters import four_bit_config
from .memory import BatchShape, image_inputs
from .parameters import eval_frozen, frozen_parts, parameter_groups, prepare, set_precision
from .recipes import Recipe
from .trainer import keep_freed_memory

WARM_UP, TIMED = 2, 3  # steps, batches; Adam's moments exist from the second step on


@dataclass(frozen=True)
class Measurement:
    """Seconds of a step of the whole batch on one device, and the peak bytes of tensors."""

    device: str
    step_seconds: float
    peak_bytes: int


def measure_step(config: Any, recipe: Recipe, shape: BatchShape, accumulation: int) -> Measurement:
    """Runs forward, backward and optimiser on random batches, on the local device."""
    keep_freed_memory()  # as a run does
    model = random_model(config, recipe).to("cuda" if torch.cuda.is_available() else "cpu").train()
    eval_frozen(frozen_parts(model))
    groups = parameter_groups(model, recipe.rates, recipe.weight_decay)
    optimiser = torch.optim.AdamW(groups, fused=True)

    def begin() -> None:
        for _ in range(WARM_UP):
            for _ in range(min(accumulation, 2)):  # a second batch finds the gradients of the first
                backward(model, config, recipe, shape)
            update(model, optimiser, recipe)

    peak = weight_bytes(model) + peak_memory(begin)
    batch_ms, optimiser_ms = [], []
    for _ in range(TIMED):
        batch_ms.append(milliseconds(partial(backward, model, config, recipe, shape)))
        optimiser_ms.append(milliseconds(partial(update, model, optimiser, recipe)))
    return Measurement(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        step_seconds=(accumulation * statistics.median(batch_ms) + statistics.median(optimiser_ms)) / 1000,
        peak_bytes=peak,
    )


def weight_bytes(model: nn.Module) -> int:
    """The bytes of a model's weights, with the scales of 4-bit weights."""
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()}
    return sum(storages.values())


def random_model(config: Any, recipe: Recipe) -> Any:
    """The model as the recipe's run would hold it, with random weights."""
    model: Any = MSResamplerForConditionalGeneration(config)
    if recipe.four_bits:
        model = in_four_bits(model, recipe)
    model = prepare(model, recipe)
    set_precision(model, torch.bfloat16 if recipe.bf16 else torch.float32)
    if recipe.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def in_four_bits(model: Any, recipe: Recipe) -> Any:
    """The model as QLoRA loads it."""
    return MSResamplerForConditionalGeneration.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), quantization_config=four_bit_config(recipe.bf16)
    )


def backward(model: nn.Module, config: Any, recipe: Recipe, shape: BatchShape) -> None:
    """Loss and gradients of a random batch, one image per record."""
    device = next(model.parameters()).device
    ids = torch.full((shape.records, shape.length), (config.image_token_id + 1) % config.text_config.vocab_size)
    ids[:, : shape.visual_tokens(config)] = config.image_token_id
    images = {name: torch.as_tensor(value).to(device) for name, value in image_inputs(config, shape).items()}
    images["pixel_values"] = torch.randn_like(images["pixel_values"])
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
        loss = model(input_ids=ids.to(device), labels=ids.to(device), **images).loss
    loss.backward()


def update(model: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe) -> None:
    """The optimiser step."""
    nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
    optimiser.step()
    optimiser.zero_grad()


def milliseconds(run: Callable[[], object]) -> float:
    """The time of a run on the device, without work that was queued before."""
    wait_for_device()
    start = time.perf_counter()
    run()
    wait_for_device()
    return 1000 * (time.perf_counter() - start)


def wait_for_device() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object]) -> int:
    """The peak bytes of the tensors that a run makes (on a GPU, less what it frees of earlier ones)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(
            activities=cpu, profile_memory=True, on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace))
        ):
            run()
        rows = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    # The profiler's own totals are off once an earlier profile's tensors were freed: it does not see that.
    made: dict[int, int] = {}
    held = peak = 0
    for event in sorted(rows, key=lambda row: row["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        held += size if size > 0 else -made.pop(address, 0)
        if size > 0:
            made[address] = size
        peak = max(peak, held)
    return peak
