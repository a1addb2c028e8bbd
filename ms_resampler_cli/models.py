"""The models that a command is given: folders, Hub repositories, or the embedded checkpoint."""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.with_name("ms_resampler")
EMBEDDED = PACKAGE / "checkpoints" / "tiny"


def model_or_embedded(model: str | None) -> str:
    """A folder or repository as it is; None is the checkpoint in this package. Raises ValueError if it cannot be."""
    folder = EMBEDDED if model is None else Path(model)
    if (folder / "config.json").is_file():
        return str(folder)
    if model is None:
        raise ValueError("The embedded checkpoint is missing: make it with `make train-tiny`, or name a --model.")
    if folder.is_dir():
        raise ValueError(f"There is no model in the folder {model!r}: it has no config.json.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise ValueError(f"{model!r} is neither a folder nor the name of a Hub repository.")
    return model
