"""Converts ours to the projector alone, with configuration, processor and code."""

import shutil
from functools import partial
from pathlib import Path

from ..folders import PROJECTOR, PROJECTOR_PREFIXES, remote_code_files
from .mapping import Plan, Row
from .source import SETTINGS
from .weights import Output, list_weights


def plan_projector(folder: Path) -> Plan:
    """The plan for a model's projector alone. Raises ValueError if there is none."""
    rows, outputs = [], []
    for weight in list_weights(folder):
        kept = weight.key.startswith(PROJECTOR_PREFIXES)
        rows.append(Row(weight.key, weight.key if kept else "", weight.shape, "as it is" if kept else "unused"))
        if kept:
            outputs.append(Output(weight.key, weight.shape, weight.dtype, weight.read))
    if not outputs:
        raise ValueError(f"{folder} has no weights of a projector.")
    return Plan("our", rows, outputs, partial(copy_settings, folder), name=Path(PROJECTOR).stem)


def copy_settings(source: Path, folder: Path) -> None:
    """Copies all files but the weights and their index, and the package's code."""
    settings = [file for pattern in SETTINGS for file in source.glob(pattern) if not file.match("*.index.json")]
    for file in [*settings, *remote_code_files()]:
        shutil.copyfile(file, folder / file.name)
