"""Stages a checkpoint in a new folder: weights, configuration, processor, and the code that runs them."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..folders import (
    INDEX,
    KNOWN,
    PROJECTOR,
    PROJECTOR_PREFIXES,
    RECORD,
    WEIGHTS,
    model_or_embedded,
    read_config,
    remote_code_files,
    require_our_type,
)
from .personal import clean_json, read_json

# The only files that are published. Code is never taken from the folder, always from this package.
ALLOWED = (
    "*.safetensors", INDEX, "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "README.md", "LICENSE", RECORD, "*.png",
)  # fmt: skip


def export(folder: str | Path, model: str | Path | None = None) -> Path:
    """Copies a checkpoint folder (default: the embedded one) and its code into a new folder, which loads anywhere."""
    return stage_checkpoint(Path(model_or_embedded(model)), Path(folder))


def stage_checkpoint(
    source: Path, target: Path, *, max_shard_size: str | None = None, projector_only: bool = False
) -> Path:
    """Copies the publishable files of `source`, and the remote code, into `target`, and returns that.

    The weights are copied unchanged, or rewritten: in shards of at most `max_shard_size` ("5GB"), or only those of the
    projector, as `projector.safetensors`. Raises ValueError if `source` is not a checkpoint or `target` is not
    empty.
    """
    check_checkpoint(source)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    rewrite = max_shard_size is not None or projector_only
    for file in [*allowed_files(source), *remote_code_files()]:
        weights = file.suffix == ".safetensors" and file.name != KNOWN
        if not (rewrite and (weights or file.name == INDEX)):
            shutil.copyfile(file, target / file.name)
    for file in target.glob("*.json"):
        if file.name not in (INDEX, "tokenizer.json", "vocab.json"):
            clean_json(file, record=file.name == RECORD)
    if projector_only:
        write_projector(source, target / PROJECTOR)
    elif max_shard_size is not None:
        write_shards(source, target, max_shard_size)
    return target


def is_allowed(name: str) -> bool:
    """Whether a file of this name may be published."""
    return not {"/", "\\"} & set(name) and any(fnmatch(name, pattern) for pattern in ALLOWED)


def allowed_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that may be published."""
    return [file for file in sorted(folder.iterdir()) if is_allowed(file.name) and file.is_file()]


def left_out(folder: Path) -> list[str]:
    """The files in the folder that are not staged, to show to the publisher."""
    code = {file.name: file for file in remote_code_files()}
    left = []
    for file in sorted(set(folder.iterdir()) - set(allowed_files(folder))):
        if file.name not in code:
            left.append(f"{file.name}/" if file.is_dir() else file.name)
        elif file.read_bytes() != code[file.name].read_bytes():
            left.append(f"{file.name} (replaced by the package's)")
    return left


def is_ours(name: str) -> bool:
    """Whether a file of this name in a repository comes from staging."""
    return is_allowed(name) or name in {file.name for file in remote_code_files()}


def is_loaded(name: str) -> bool:
    """Whether a file of this name is read when a repository is loaded, so that an outdated one must be removed."""
    return is_ours(name) and not fnmatch(name, "*.png") and name not in ("LICENSE", "README.md")


def check_checkpoint(folder: Path, name: str | None = None) -> None:
    """Raises ValueError unless a folder, shown as `name`, holds exactly one complete checkpoint of this package."""
    shown = name or folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{shown} is not a checkpoint folder: it has no config.json.")
    require_our_type(str(shown), read_config(folder))
    sets = [file for file in (WEIGHTS, INDEX, PROJECTOR) if (folder / file).is_file()]
    if not sets:
        raise ValueError(f"{shown} has no weights: neither {WEIGHTS} nor {INDEX}.")
    if len(sets) > 1:
        what = " and ".join(sets).replace(INDEX, "shards with an index")
        raise ValueError(f"{shown} holds both {what}: remove those that you do not mean to publish.")
    try:
        files = tensor_files(folder)
    except ValueError as error:
        raise ValueError(f"{shown} is not complete: {error}") from error
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise ValueError(f"{shown} is not complete: {INDEX} names {file.name}, which is not there.")
        with open_weights(file) as weights:
            lacking = {tensor for tensor, where in files.items() if where == file} - set(weights.keys())
        if lacking:
            raise ValueError(
                f"{shown} is not complete: {INDEX} says that {min(lacking)} is in {file.name}, but it is not."
            )


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file in the folder that each tensor of a checkpoint is in, by the tensor's name."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{INDEX} has no weight_map, which names the file of every tensor.")
        outside = [name for name in names.values() if not (is_allowed(name) and name.endswith(".safetensors"))]
        if outside:
            raise ValueError(f"{INDEX} names {outside[0]!r}, which is not a safetensors file in the same folder.")
        return {tensor: folder / name for tensor, name in names.items()}
    file = next((folder / name for name in (WEIGHTS, PROJECTOR) if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}.")
    with open_weights(file) as weights:
        return dict.fromkeys(weights.keys(), file)


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A file of weights, read lazily. Raises ValueError unless its header matches the bytes that follow."""
    try:
        opened = safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file.name} is damaged ({error}): save the checkpoint again.") from error
    with opened as weights:
        yield weights


def write_shards(source: Path, target: Path, max_shard_size: str) -> None:
    """Writes the weights of `source` to `target`, one shard in memory at a time."""
    files = tensor_files(source)
    try:
        split = split_state_dict_into_shards_factory(
            {name: tensor_size(file, name) for name, file in files.items()},
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"{max_shard_size!r} is not a shard size such as 5GB: {error}") from error
    for shard, names in split.filename_to_tensors.items():
        write_tensors({name: files[name] for name in names}, target / shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def tensor_size(file: Path, name: str) -> int:
    """Bytes of a tensor in a file, without reading it; its dtype is "F32", "BF16", "F8_E4M3", "BOOL" or the like."""
    with open_weights(file) as weights:
        tensor = weights.get_slice(name)
        bits = re.search(r"\d+", tensor.get_dtype())
        return math.prod(tensor.get_shape()) * (int(bits[0]) // 8 if bits else 1)


def tensor_elements(file: Path, name: str) -> int:
    """Numbers in a tensor in a file, without reading them."""
    with open_weights(file) as weights:
        return math.prod(weights.get_slice(name).get_shape())


def write_projector(source: Path, path: Path) -> None:
    """Writes the projector's weights, with their names in the whole model."""
    files = {name: file for name, file in tensor_files(source).items() if name.startswith(PROJECTOR_PREFIXES)}
    if not files:
        raise ValueError(f"{source} has no weights of a projector.")
    write_tensors(files, path)


def write_tensors(files: dict[str, Path], path: Path) -> None:
    """Copies tensors, each given with its file, into one file."""
    tensors = {}
    for name, file in files.items():
        with open_weights(file) as weights:
            tensors[name] = weights.get_tensor(name)
    save_file(tensors, path, metadata={"format": "pt"})
