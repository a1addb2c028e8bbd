"""Converts checkpoints: others to ours, ours to transformers' LLaVA, and ours to a projector alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ..folders import read_config, require_our_type, whole_folder
from .layouts import open_source
from .mapping import Plan
from .source import local_folder
from .to_llava import plan_llava
from .to_ours import plan_ours
from .to_projector import plan_projector
from .weights import write_weights

Target = Literal["ours", "llava", "projector"]


def plan_conversion(
    source: str | Path,
    *,
    to: Target = "ours",
    projector: dict[str, Any] | None = None,
    tower: str | Path | None = None,
    llm: str | Path | None = None,
) -> Plan:
    """What `convert` would do with every weight; reads everything but the weights themselves.

    Raises ValueError, with their names, if weights are missing or do not fit.
    """
    folder = local_folder(source)
    if to == "ours":
        names = [None if name is None else str(name) for name in (tower, llm)]
        return plan_ours(open_source(folder, projector or {}, *names))
    if projector or tower or llm:
        raise ValueError(f"A conversion to {to!r} keeps the model as it is: it takes no other projector, tower or LLM.")
    require_our_type(str(source), read_config(folder))
    return plan_llava(folder) if to == "llava" else plan_projector(folder)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Target = "ours",
    projector: dict[str, Any] | None = None,
    tower: str | Path | None = None,
    llm: str | Path | None = None,
    progress: Callable[[int], Any] = lambda _: None,
) -> Plan:
    """Converts a checkpoint, a folder or a Hub repository, into the new folder `out`; returns the plan of its weights.

    `projector` are the fields of another projector; `tower` and `llm` are models that the checkpoint lacks.
    `to="llava"` writes transformers' LLaVA layout, `to="projector"` only the projector. `progress` is called with the
    bytes of each weight that is written; at most one shard of the weights is in memory.

    Raises ValueError if the folder exists or a weight does not fit, OSError if something cannot be read.
    """
    plan = plan_conversion(source, to=to, projector=projector, tower=tower, llm=llm)
    write(plan, Path(out), progress)
    return plan


def write(plan: Plan, out: Path, progress: Callable[[int], Any] = lambda _: None) -> None:
    """Writes the folder of a plan atomically."""
    with whole_folder(out) as folder:
        plan.write_settings(folder)
        write_weights(plan.outputs, folder, plan.name, progress)
