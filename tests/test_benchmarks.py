"""The benchmarks count what the peers' publications and original code add up to."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from model import LANGUAGE_MODEL, TOWER, WORDS, make_models, make_runs
from projectors import PUBLISHED, Setting, cost, draw, measure, rates, table

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


def test_projectors_are_measured_in_turn(tmp_path, monkeypatch):
    assert set(PUBLISHED) >= set(ORIGINALS)
    monkeypatch.setattr("projectors.rates", lambda dtype: (1e9, 1e9))
    names = ["resampler", "ms_resampler", "ms_resampler, branches", "mqt"]
    setting = Setting(grid=4, tokens=4, batch=2, backward=True)
    rows = measure(setting, names, repeats=2)
    assert [(row["projector"], len(row["ms"])) for row in rows] == [(name, 2) for name in names]
    one, shared, branches, _ = (row["macs"] for row in rows)
    assert one <= shared < 1.001 * one < branches  # scopes that share out the heads cost no more than their gate
    assert all(row["peak_bytes"] > 4 * row["parameters"] for row in rows)  # the gradients are among it
    assert len(table(rows).splitlines()) == 2 + len(names)
    draw([{"setting": {"grid": 4, "tokens": 4}, "rows": rows}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_the_floor_is_what_this_machine_can_do():
    macs, bytes_moved = rates(torch.float32)
    assert 1e8 < macs < 1e15
    assert 1e8 < bytes_moved < 1e14


def test_llava_and_ours_answer_with_the_same_parts():
    tower = {"image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    text = {"vocab_size": 1200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    llava, ours = make_models(TOWER | tower, LANGUAGE_MODEL | text | {"num_attention_heads": 4})
    assert {id(p) for p in llava.model.vision_tower.parameters()} <= {id(p) for p in ours.parameters()}
    assert {id(p) for p in llava.model.language_model.parameters()} <= {id(p) for p in ours.parameters()}
    answers = {name: run() for name, run in make_runs(llava, ours, images=2, budgets=[4, 9], new_tokens=3).items()}
    lengths = {"LLaVA, 16": 2 * 16, "ours, 4": 2 * 4, "ours, 9": 2 * 9}
    assert {name: answer.shape[1] for name, answer in answers.items()} == {
        name: visual + WORDS + 3 for name, visual in lengths.items()
    }
