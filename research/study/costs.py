"""Costs of the study's projectors: multiply-accumulates, and interleaved times in one run."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..timing import count_macs, interleaved, machine, times_as_long
from .data import CHANNELS, GRID, PATCHES
from .plan import BASELINE, REFERENCE, Study, make_projector, make_run

REPEATS = 41


def measure_costs(study: Study) -> dict[str, Any]:
    """For every projector at the middle budget: MACs of an image, median ms of a batch forward and with gradients, and
    the medians of their ratios to BASELINE in the same round.
    """
    forward, backward, macs = {}, {}, {}
    for arm in study.arms:
        run = make_run(study, arm, [study.middle], 0, 0)
        projector = make_projector(run.projector)
        macs[arm] = count_macs(partial(projector, torch.randn(1, PATCHES, CHANNELS), GRID, run.grids[0]))
        forward[arm] = make_step(projector, run.grids[0], study.batch_size, gradients=False)
        backward[arm] = make_step(projector, run.grids[0], study.batch_size, gradients=True)
    times = {"forward": interleaved(forward, REPEATS), "backward": interleaved(backward, REPEATS)}
    return {
        "machine": machine(),
        "projectors": {
            f"{arm} (144 tokens)" if arm in REFERENCE else arm: {
                "macs": macs[arm],
                **{part: round(statistics.median(spent[arm]), 3) for part, spent in times.items()},
                **{f"{part}_x": round(times_as_long(spent[arm], spent[BASELINE]), 3) for part, spent in times.items()},
            }
            for arm in study.arms
        },
    }


def make_step(
    projector: torch.nn.Module, grid: tuple[int, int], batch_size: int, gradients: bool
) -> Callable[[], None]:
    """A projector's run on random features, forward alone or with all gradients."""
    x_BNC = torch.randn(batch_size, PATCHES, CHANNELS)

    def step() -> None:
        with torch.set_grad_enabled(gradients):
            y = projector(x_BNC, GRID, grid)
        if gradients:
            (y[0] if isinstance(y, tuple) else y).sum().backward()

    return step
