"""Stages a checkpoint: weights, configuration, processor and the code that runs them, in one fresh folder."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

PACKAGE = Path(__file__).parent.parent

# The only files that leave a folder. Code is never taken from the folder: the package's is the only copy.
ALLOWED = (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json",
    "processor_config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "README.md", "LICENSE", "training_record.json", "*.png",
)  # fmt: skip


def remote_code_files() -> list[Path]:
    """The files that `trust_remote_code` loads: flat siblings that import nothing else of the package."""
    return sorted(PACKAGE.glob("*_ms_resampler.py"))


def allowed_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that may leave it."""
    return [file for file in sorted(folder.iterdir()) if any(fnmatch(file.name, pattern) for pattern in ALLOWED)]


def stage_checkpoint(source: Path, target: Path) -> list[str]:
    """Copies what may be published of `source`, and the remote code, into `target`; returns the file names.

    Raises ValueError if `source` is no checkpoint or `target` holds files already.
    """
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is not a checkpoint folder: it has no config.json.")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; give a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    for file in [*allowed_files(source), *remote_code_files()]:
        shutil.copyfile(file, target / file.name)
    return sorted(file.name for file in target.iterdir())
