"""What of a model a run has changed, bit by bit."""

from pathlib import Path

import torch
from killed_runs import weights

from ms_resampler.training.parameters import part_of

PARTS = ("tower", "projector", "llm", "embeddings")


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts in which a tensor or buffer differs."""
    assert before.keys() == after.keys()
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def assert_frozen(parts: set[str], start: Path, result: Path) -> None:
    """That a run from a folder has changed all parts but these, and batch statistics only if the tower learns."""
    before, after = weights(start), weights(result)
    assert changed_parts(before, after) == {*PARTS} - parts
    statistics = [name for name in before if "running_" in name or name.endswith("num_batches_tracked")]
    assert statistics
    assert any(not torch.equal(before[name], after[name]) for name in statistics) == ("tower" not in parts)
