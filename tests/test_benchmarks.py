"""The benchmarks count what the peers' publications and original code add up to."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from projectors import PUBLISHED, cost, make_run

from ms_resampler.evaluation.timing import interleaved

# Parameters and multiply-accumulates in millions, counted on the originals at 576 x 1024 -> 144 -> 4096. Tables of
# positions that are never trained are not counted here: 256 x 1024 in mqt, 144 x 4096 in qwen_resampler.
ORIGINALS = {
    "mlp": (20.98, 12080),
    "avg_pool": (20.98, 3020),
    "token_packer": (36.72, 10720),
    "c_abstractor": (37.40, 7570),
    "ldp_v2": (21.02, 12080),
    "mqt": (8.92 - 0.26, 2280),
    "saep": (21.02, 12080),
    "pixel_shuffle": (33.57, 4830),
    "qwen_resampler": (89.30 - 0.59, 29670),
    "perceiver": (67.30, 13920),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_peer_costs_what_its_original_does(name):
    parameters, macs = cost(name)
    assert parameters / 1e6 == pytest.approx(ORIGINALS[name][0], abs=0.011)
    assert macs / 1e6 == pytest.approx(ORIGINALS[name][1], rel=0.02)


def test_projectors_run_forward_and_backward_in_turn():
    torch.manual_seed(0)
    assert set(PUBLISHED) >= set(ORIGINALS)
    runs = {name: make_run(name, 1, torch.float32, backward=True) for name in ("resampler", "ms_resampler", "mqt")}
    times = interleaved(runs, repeats=2)
    assert {name: len(spent) for name, spent in times.items()} == dict.fromkeys(runs, 2)
