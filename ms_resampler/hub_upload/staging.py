"""Stages a checkpoint: weights, configuration, processor and the code that runs them, in one fresh folder."""

import json
import math
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file

PACKAGE = Path(__file__).parent.parent
WEIGHTS, INDEX, PROJECTOR = "model.safetensors", "model.safetensors.index.json", "projector.safetensors"
RECORD = "training_record.json"

# The only files that leave a folder. Code is never taken from the folder: the package's is the only copy.
ALLOWED = (
    "*.safetensors", INDEX, "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "README.md", "LICENSE", RECORD, "*.png",
)  # fmt: skip


def remote_code_files() -> list[Path]:
    """The files that `trust_remote_code` loads: flat siblings that import nothing else of the package."""
    return sorted(PACKAGE.glob("*_ms_resampler.py"))


def is_allowed(name: str) -> bool:
    """Whether a file of this name may leave a folder."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in ALLOWED)


def allowed_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that may leave it."""
    return [file for file in sorted(folder.iterdir()) if is_allowed(file.name) and file.is_file()]


def is_ours(name: str) -> bool:
    """Whether a file of this name, in a repository, is one that staging puts there."""
    return is_allowed(name) or name in {file.name for file in remote_code_files()}


def is_loaded(name: str) -> bool:
    """Whether a file of this name is read when a repository is loaded, and misleads if it is an old one."""
    return is_ours(name) and not fnmatch(name, "*.png") and name not in ("LICENSE", "README.md")


def stage_checkpoint(
    source: Path, target: Path, *, max_shard_size: str | None = None, projector_only: bool = False
) -> list[str]:
    """Copies what may be published of `source`, and the remote code, into `target`; returns the file names.

    The weights are copied as they are, or written anew: in shards of at most `max_shard_size` ("5GB"), or those of
    the projector alone, as `projector.safetensors`. Raises ValueError if `source` is no checkpoint or `target` holds
    files already.
    """
    check_checkpoint(source)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    rewrite = max_shard_size is not None or projector_only
    for file in [*allowed_files(source), *remote_code_files()]:
        if not (rewrite and (file.suffix == ".safetensors" or file.name == INDEX)):
            shutil.copyfile(file, target / file.name)
    if (target / RECORD).is_file():
        hide_folders(target / RECORD)
    if projector_only:
        write_projector(source, target / PROJECTOR)
    elif max_shard_size is not None:
        write_shards(source, target, max_shard_size)
    return sorted(file.name for file in target.iterdir())


def hide_folders(record: Path) -> None:
    """Takes the folders of this machine out of a record: "/home/ada/data/a.json" becomes "a.json"."""
    text = record.read_text(encoding="utf-8")
    shown = re.sub(r'(?<=")(?:/|~/|[A-Za-z]:\\\\)[^"\n]*?([^/\\"\n]+)[/\\]*(?=")', r"\1", text)
    if shown != text:
        record.write_text(shown, encoding="utf-8")


def check_checkpoint(folder: Path) -> None:
    """Raises ValueError unless a folder holds one whole checkpoint of ours, by its own account."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json.")
    if not (folder / INDEX).is_file():
        return
    if (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds both {WEIGHTS} and shards with an index: remove the ones that are not meant.")
    missing = sorted({file.name for file in tensor_files(folder).values() if not file.is_file()})
    if missing:
        raise ValueError(f"{folder} is not complete: {INDEX} names {', '.join(missing)}, which is not there.")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor of a checkpoint -> the file it is in."""
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        return {tensor: folder / name for tensor, name in names.items()}
    file = next((folder / name for name in (WEIGHTS, PROJECTOR) if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}.")
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(weights.keys(), file)


def write_shards(source: Path, target: Path, max_shard_size: str) -> None:
    """Writes the weights of `source` to `target`, one shard in memory at a time."""
    files = tensor_files(source)
    split = split_state_dict_into_shards_factory(
        {name: tensor_size(file, name) for name, file in files.items()},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for shard, names in split.filename_to_tensors.items():
        write_tensors({name: files[name] for name in names}, target / shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def tensor_size(file: Path, name: str) -> int:
    """Bytes of a tensor in a file, without reading it: its type is "F32", "BF16", "F8_E4M3", "BOOL" or the like."""
    with safe_open(file, "pt") as weights:
        tensor = weights.get_slice(name)
        bits = re.search(r"\d+", tensor.get_dtype())
        return math.prod(tensor.get_shape()) * (int(bits[0]) // 8 if bits else 1)


def tensor_elements(file: Path, name: str) -> int:
    """Numbers in a tensor in a file, without reading them."""
    with safe_open(file, "pt") as weights:
        return math.prod(weights.get_slice(name).get_shape())


def write_projector(source: Path, path: Path) -> None:
    """Writes the projector's weights, under the names they have in the whole model."""
    files = {name: file for name, file in tensor_files(source).items() if name.startswith("model.projector.")}
    if not files:
        raise ValueError(f"{source} has no weights of a projector.")
    write_tensors(files, path)


def write_tensors(files: dict[str, Path], path: Path) -> None:
    """Copies tensors, given with the file that each is in, into one file."""
    tensors = {}
    for name, file in files.items():
        with safe_open(file, "pt") as weights:
            tensors[name] = weights.get_tensor(name)
    save_file(tensors, path, metadata={"format": "pt"})
