"""Model folders and their file names, and writing files and folders atomically.

This module imports nothing heavy, so that `ms-resampler demo` can start its page at once.
"""

import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

PACKAGE = Path(__file__).resolve().parent
EMBEDDED = PACKAGE / "checkpoints" / "tiny"
WEIGHTS, INDEX, PROJECTOR = "model.safetensors", "model.safetensors.index.json", "projector.safetensors"
KNOWN = "known_inputs.safetensors"  # no weights: what pictures of the training look like to the tower
RECORD = "training_record.json"
LOCK = ".ms-resampler.lock"
# The names of trained weights begin so: the projector's, and those of LLaVA-Mini's pre-fusion beside it.
PROJECTOR_PREFIXES = ("model.projector.", "model.fusion.")


def remote_code_files() -> list[Path]:
    """The files that `trust_remote_code` loads: flat siblings that import nothing else of the package."""
    return sorted(PACKAGE.glob("*_ms_resampler.py"))


def model_or_embedded(model: str | Path | None) -> str:
    """A folder or repository name; None is the embedded checkpoint. Raises ValueError if it cannot be a model."""
    folder, model = EMBEDDED if model is None else Path(model), None if model is None else str(model)
    if (folder / "config.json").is_file():
        return str(folder)
    if model is None:
        raise ValueError("The embedded checkpoint is missing: make it with `make train-tiny`, or name a --model.")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{model!r} holds adapters, not a whole model: merge them first, `ms-resampler merge`.")
    if folder.is_dir():
        raise ValueError(f"There is no model in the folder {model!r}: it has no config.json.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ValueError(f"{model!r} is neither a folder nor the name of a Hub repository.")
    return model


def our_model(model: str | Path | None, revision: str | None = None) -> str:
    """As `model_or_embedded`, for models of this package only.

    Raises ValueError, with what to do, for any other model; OSError if a repository cannot be read.
    """
    if str(model).endswith(".gguf"):
        raise ValueError(f"{model} is a language model: put a model together with `ms-resampler init --llm {model}`.")
    place = model_or_embedded(model)
    if Path(place).is_dir():
        require_our_type(place, read_config(Path(place)))
    else:
        from transformers import PreTrainedConfig  # slow to import, and rarely needed here

        try:
            config, _ = PreTrainedConfig.get_config_dict(place, revision=revision)
        except OSError as error:
            raise OSError(f"{place} cannot be loaded: {' '.join(str(error).split())}") from error
        require_our_type(place, config)
    return place


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises ValueError if it is missing or damaged."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no checkpoint: it has no config.json.") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged: it is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is damaged: it is no JSON object.")
    return config


def require_our_type(name: str, config: dict[str, Any]) -> None:
    """Raises ValueError if a config.json is not that of a model of this package."""
    kind = config.get("model_type")
    if kind != "ms_resampler":
        raise ValueError(
            f"{name} is {f'a `{kind}` model' if kind else 'a model of unknown type'}, not one of this package: put one "
            "together with `ms-resampler init`, or convert a LLaVA-style checkpoint with `ms-resampler convert`."
        )


def find_app() -> Path:
    """app.py of the Space: inside the folder of ms_resampler in a wheel, beside it in a checkout."""
    for folder in (PACKAGE / "space_app", PACKAGE.with_name("space_app")):
        if (folder / "app.py").is_file():
            return folder / "app.py"
    raise FileNotFoundError("The demo's space_app folder is neither inside nor beside the installed package.")


@contextmanager
def temporary_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder. Folders that killed processes left under the same name are removed first."""
    parent = parent or Path(tempfile.gettempdir())
    for lock in parent.glob(f"{glob.escape(name)}-????????/{LOCK}"):
        with suppress(OSError), FileLock(lock, blocking=False):  # a running process holds its lock
            shutil.rmtree(lock.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=parent) as place, FileLock(Path(place, LOCK)):
        yield Path(place)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `out` when complete. Raises ValueError if `out` exists."""
    if out.exists():
        raise ValueError(f"{out} is there already: give a new folder, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(f".{out.name}", out.parent) as place:
        partial = place / out.name
        partial.mkdir()
        yield partial
        partial.rename(out)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, renamed to `path` when complete."""
    fresh = path.with_name(f"{path.name}.new")
    yield fresh
    fresh.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with whole_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file atomically; makes the target's folder if needed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as fresh:
        shutil.copyfile(source, fresh)


def datasets_cache(place: str | Path) -> str | None:
    """Where `datasets` keeps what it made of a folder, another place for every state of its files; None for a name.

    `datasets` itself takes all folders of one name for the same, and a folder for unchanged after its files were.
    """
    import datasets

    if not Path(place).is_dir():
        return None
    files = sorted(path for path in Path(place).resolve().rglob("*") if path.is_file())
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(states).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE, f"local-{digest}"))
