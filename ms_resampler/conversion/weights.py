"""Reads weights one at a time from safetensors or, safely, from PyTorch files, and writes them shard by shard."""

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..folders import KNOWN

SHARD_BYTES = 2_000_000_000  # bytes in memory at a time


@dataclass(frozen=True)
class Weight:
    """A tensor of a checkpoint that has not been read yet: its name, file, shape and dtype."""

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The tensor, from the disk."""
        if self.file.suffix == ".safetensors":
            with safe_open(self.file, "pt") as file:
                return file.get_tensor(self.key)
        return pytorch_file(self.file)[self.key]


def list_weights(folder: Path) -> list[Weight]:
    """The weights of a checkpoint folder. Raises ValueError if it has none, OSError if a file cannot be read."""
    files = sorted({*folder.glob("*.safetensors")} - {folder / KNOWN}) or sorted(folder.glob("*.bin"))
    check_index(folder)
    weights = [weight for file in files for weight in weights_of(file)]
    if not weights:
        raise ValueError(f"There are no weights in {folder}: it has neither .safetensors nor .bin files.")
    return weights


def weights_of(file: Path) -> list[Weight]:
    """The weights of one file. Raises OSError if it is damaged, ValueError if it is not safe to read."""
    if file.suffix != ".safetensors":
        return [Weight(key, file, tuple(value.shape), value.dtype) for key, value in pytorch_file(file).items()]
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
            slices = {key: opened.get_slice(key) for key in keys}
            return [Weight(key, file, tuple(s.get_shape()), dtype_named(s.get_dtype())) for key, s in slices.items()]
    except SafetensorError as error:
        raise OSError(f"{file} is damaged or not complete: download it again ({error}).") from error


def dtype_named(name: str) -> torch.dtype:
    """safetensors' name of a dtype: "BF16" -> torch.bfloat16."""
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "BOOL": "bool"}
    if name not in names:
        raise ValueError(f"Weights of the type {name} cannot be converted: give a checkpoint in full precision.")
    return getattr(torch, names[name])


@lru_cache(maxsize=1)
def pytorch_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped into memory. Raises ValueError if it holds anything but tensors."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{file} cannot be read safely, so it is not read: it must be a PyTorch file of tensors alone ({reason})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} does not hold a table of named tensors.")
    return state


def check_index(folder: Path) -> None:
    """Raises OSError if an index names missing files."""
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise OSError(f"{folder} lacks {', '.join(missing)}, which {index.name} names: download it again.")


@dataclass(frozen=True)
class Output:
    """A weight to write: its name, shape and dtype, and the function that returns it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(outputs: Sequence[Output], folder: Path, name: str, progress: Callable[[int], Any]) -> None:
    """Writes `name`.safetensors, or shards and their index; no more than one shard is in memory."""
    shards = list(shards_of(outputs))
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        names = [f"{name}-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for output in shard:
            tensors[output.key] = output.make().to(output.dtype).contiguous()
            assert tensors[output.key].shape == output.shape, output.key
            progress(output.bytes)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if len(shards) > 1:
        where = {output.key: file for file, shard in zip(names, shards, strict=True) for output in shard}
        total = sum(output.bytes for output in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shards_of(outputs: Sequence[Output]) -> Iterator[list[Output]]:
    """Weights in order, as many at a time as fit a shard."""
    shard: list[Output] = []
    for output in outputs:
        if shard and sum(other.bytes for other in shard) + output.bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(output)
    yield shard
