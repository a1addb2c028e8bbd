"""`plan`: estimates the memory and time of a recipe on given hardware."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..assembly import Components, make_config, text_config_of, tower_config_of
from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import our_model
from ..tiles_ms_resampler import grids_of
from .memory import BatchShape, Sizes, device_bytes, step_sizes
from .recipes import Recipe, recipe_named
from .run import share_batch
from .step_time import Measurement, measure_step

GB = 1e9
CONTEXT = 1e9  # approximate memory of CUDA and its libraries


@dataclass(frozen=True)
class Plan:
    """Memory and time of a recipe: `str(plan)` is the report.

    `kinds` are the bytes on each device by kind (weights, activations, ...), `memory` the bytes of a device,
    `visual_tokens` and `patches` those of an image, `records` the size of the data, `measurement` a step run here,
    `cores` those of this machine if the plan is for its processor.
    """

    recipe: Recipe
    shape: BatchShape
    sizes: Sizes
    kinds: dict[str, float]
    memory: float
    gpus: int
    visual_tokens: int
    patches: int
    records: int | None = None
    measurement: Measurement | None = None
    cores: int | None = None

    @property
    def total(self) -> float:
        """Bytes on each device, without CUDA itself."""
        return sum(self.kinds.values())

    @property
    def fits(self) -> bool:
        """Whether a device has that much memory."""
        return self._spare >= 0

    @property
    def _spare(self) -> float:
        return self.memory - self.total - (0 if self.cores else CONTEXT)

    def __str__(self) -> str:
        sections = [self._parameters(), self._memory(), self._tokens()]
        return "\n\n".join(sections) + (f"\n{self._measured(self.measurement)}" if self.measurement else "")

    def _parameters(self) -> str:
        rows = [f"{'part':12}{'parameters':>14}{'trainable':>14}  rate"]
        for part, count in self.sizes.parts.items():
            rate = getattr(self.recipe.rates, part)
            total = count["trainable"] + count["frozen"]
            rows.append(f"{part:12}{total / 1e6:>12,.1f} M{count['trainable'] / 1e6:>12,.1f} M  {rate or 'frozen'}")
        return "\n".join(rows)

    def _memory(self) -> str:
        notes = {
            "gathered": "layers gathered, or buckets of gradients",
            "activations": f"{self.shape.records} records of {self.shape.length} tokens at a time",
        }
        rows = [f"{'memory':12}{'GB a device':>14}"]
        kinds = {kind: size for kind, size in self.kinds.items() if size}
        rows += [f"{kind:12}{size / GB:>14.2f}  {notes.get(kind, '')}".rstrip() for kind, size in kinds.items()]
        return "\n".join([*rows, f"{'total':12}{self.total / GB:>14.2f}  {self._verdict()}"])

    def _verdict(self) -> str:
        memory, spare = f"{self.memory / GB:.3g} GB", f"{self._spare / GB:.1f} to spare"
        if self.cores:
            memory += f" of this machine, which has {self.cores} cores and no GPU"
            more = "lower --device-batch-size, or plan for --gpus"
        else:
            spare += " (CUDA itself takes about 1)"
            more = "lower --device-batch-size, or use --liger or more --gpus"
        return f"fits into {memory}, {spare}" if self.fits else f"does not fit into {memory}: {more}"

    def _tokens(self) -> str:
        batch = self.recipe.batch_size
        return (
            f"A step has {batch} records, up to {batch * self.shape.length:,} tokens. An image is {self.visual_tokens} "
            f"visual tokens of {self.patches} patches: {1 - self.visual_tokens / self.patches:.0%} fewer."
        )

    def _measured(self, measurement: Measurement) -> str:
        lines = [f"Measured here, on one {measurement.device}: {measurement.peak_bytes / GB:.2f} GB at most."]
        if self.gpus == 1:
            lines[0] += f" The estimate is {self.total / GB:.2f} GB."
        seconds = measurement.step_seconds
        lines.append(f"On {self.gpus} of these a step takes {seconds:.2f} s, without communication.")
        recipe, records = self.recipe, self.records
        if steps := recipe.steps or (records and math.ceil(recipe.epochs * records / recipe.batch_size)):
            lines.append(f"{steps:,} steps take {duration(steps * seconds)}.")
        return "\n".join(lines)


def plan(
    recipe: Recipe | str,
    *,
    model: str | Path | None = None,
    vision: str | None = None,
    llm: str | None = None,
    visual_tokens: int = 144,
    gpus: int | None = None,
    memory: float | None = None,
    launcher: str | None = None,
    device_batch: int | None = None,
    length: int | None = None,
    records: int | None = None,
    measure: bool = False,
) -> Plan:
    """Estimates the memory and time of a recipe from configurations, without loading weights.

    The model is `model`, a folder or Hub name, or assembled from the tower `vision` and the language model `llm` with
    `visual_tokens` an image. There are `gpus` devices of `memory` GB (default: 80) over all machines, or if neither is
    given, the one device of this machine. They are started by `launcher` ("ddp", "fsdp2", "zero2" or "zero3"; default:
    fsdp2 for several devices), each with `device_batch` records of `length` tokens at a time (default: the recipe's).
    `measure` times a few steps here, with random weights; `records` in the
    data extrapolates that to the whole run. Raises ValueError if these do not fit together.
    """
    recipe = recipe_named(recipe)
    for name, value in {"gpus": gpus, "length": length, "records": records, "memory": memory}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"The plan's {name} must be above 0, got {value}.")
    if length is not None and length > recipe.max_length:
        raise ValueError(f"The recipe takes records of {recipe.max_length} tokens at most: change --max-length, too.")
    config = model_config(model, vision, llm, visual_tokens)
    is_here = gpus is None and memory is None
    gpus, memory = gpus or 1, memory_here() if is_here else (memory or 80) * GB
    launcher = launcher or ("ddp" if gpus == 1 else "fsdp2")
    device_batch, accumulation = share_batch(recipe, gpus, device_batch)
    tiles = None if recipe.tiles is None else max(grids_of(recipe.tiles), key=math.prod)  # of the largest pictures
    shape = BatchShape(device_batch, length or recipe.max_length, config.tower.image_size, tiles)
    tiling, _ = shape.layout(config)
    sizes = step_sizes(config, recipe, shape, launcher)
    return Plan(
        recipe=recipe,
        shape=shape,
        sizes=sizes,
        kinds=device_bytes(sizes, recipe, launcher, gpus),
        memory=memory,
        gpus=gpus,
        visual_tokens=shape.visual_tokens(config),
        patches=math.prod(tiling.patches if tiling else config.native_patch_grid),
        records=records,
        measurement=measure_step(config, recipe, shape, accumulation) if measure else None,
        cores=os.cpu_count() if is_here and not torch.cuda.is_available() else None,
    )


def memory_here() -> float:
    """The bytes of this machine's GPU, or else of its memory, of which a container may have a part."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    return min(memory, int(text)) if limit.is_file() and (text := limit.read_text().strip()).isdigit() else memory


def model_config(model: str | Path | None, vision: str | None, llm: str | None, visual_tokens: int) -> Any:
    """The configuration of a model, or of one assembled from a tower and a language model."""
    if model is not None:
        return MSResamplerConfig.from_pretrained(our_model(model))
    if not (vision and llm):
        raise ValueError("Name a --model, or a --vision tower and an --llm.")
    components = Components(vision, llm, {"visual_tokens": visual_tokens})
    return make_config(components, tower_config_of(vision), text_config_of(llm), image_token_id=0)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever fits."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
