"""Features of a frozen tower on disk, one file a picture, so that later epochs and runs do not compute them again.

A file's name is the SHA-256 of what the tower reads, and of all that decides what it makes of it: weights,
configuration, layers, precision. Files appear whole, so that several processes and killed runs can share a folder.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput

from ..modeling_ms_resampler import MSResamplerModel
from ..towers_ms_resampler import states_of
from .recipes import Recipe

BYTES = 4  # of a value; fewer if the tower computes in 16 bits


def cache_features(model: Any, folder: Path, recipe: Recipe) -> "CachedTower":
    """Makes a model's tower read and fill a folder.

    Raises ValueError if the tower is trained, or sharded, since then all processes must run it together.
    """
    if recipe.rates.tower is not None:
        raise ValueError("Features of a tower that is trained change with every step: freeze it, or do not cache them.")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or is_deepspeed_zero3_enabled():
        raise ValueError("Features cannot be cached while the tower is sharded: launch with ddp or zero2.")
    base: Any = next(module for module in model.modules() if isinstance(module, MSResamplerModel))
    cached = CachedTower(base, base._run_tower, folder)
    base._run_tower = cached
    return cached


class CachedTower:
    """What `MSResamplerModel._run_tower` returns, of which the states that are not read are None."""

    def __init__(self, base: Any, run: Callable[..., Any], folder: Path):
        self.base = base
        self.run = run
        self.folder = folder
        self.count = len(base.tower_shape.states)
        self.layers = sorted({layer % self.count for layer in base.config.feature_layers})

    def __call__(self, pixel_values: Tensor, mask: Tensor | None, shapes: Tensor | None, **kwargs: Any) -> Any:
        pixel_values = pixel_values.to(self.base.vision_tower.dtype)
        keys = [self._key(*row) for row in self._rows(pixel_values, mask, shapes)]
        missing = [row for row, key in enumerate(keys) if key not in keys[:row] and not self._file(key).exists()]
        if missing:
            few = [None if values is None else values[missing] for values in (pixel_values, mask, shapes)]
            states = states_of(self.run(*few, **kwargs))
            for number, row in enumerate(missing):
                self._store(keys[row], {str(layer): states[layer][number] for layer in self.layers})
        stored = [load_file(self._file(key)) for key in keys]
        read: list[Tensor | None] = [None] * self.count
        for layer in self.layers:
            read[layer] = torch.stack([states[str(layer)] for states in stored]).to(pixel_values.device)
        return BaseModelOutput(last_hidden_state=read[-1], hidden_states=tuple(read))

    def _rows(self, *inputs: Tensor | None) -> Any:
        """The inputs of each picture, on the CPU."""
        return zip(*(values.cpu() for values in inputs if values is not None), strict=True)

    def _key(self, *row: Tensor) -> str:
        device = self.base.vision_tower.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        digest = hashlib.sha256(f"{self._tower} {precision}".encode())
        for values in row:
            add(digest, values)
        return digest.hexdigest()

    @cached_property
    def _tower(self) -> str:
        config = self.base.config
        digest = hashlib.sha256(json.dumps([config.vision_config.to_json_string(), self.layers]).encode())
        for name, values in self.base.vision_tower.state_dict().items():
            digest.update(name.encode())
            add(digest, values)
        return digest.hexdigest()

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _store(self, key: str, states: dict[str, Tensor]) -> None:
        file = self._file(key)
        unfinished = file.with_name(f"{key}.{uuid.uuid4().hex}.new")  # another process may write the same
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: values.contiguous() for name, values in states.items()}, unfinished)
            unfinished.replace(file)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                unfinished.unlink()
            raise OSError(f"Features could not be kept in {self.folder} ({error}): make room for them.") from error

    def notice(self, records: int | None) -> str:
        """A sentence on the size of the folder, for a number of records with pictures or (None) a stream."""
        shape = self.base.tower_shape
        states = [shape.states[layer] for layer in self.layers]
        values = sum((state.grid[0] * state.grid[1] + (shape.prefix_tokens or 0)) * state.width for state in states)
        size = values * BYTES
        total = "" if records is None else f", {records * size / 1e9:,.2f} GB for {records:,} records with one each"
        return f"Features of the tower are kept in {self.folder}: at most {size / 1e6:.2f} MB a picture{total}."


def add(digest: Any, values: Tensor) -> None:
    """Adds a tensor to a hash: its type, shape and bits."""
    digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
    digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
