"""The embedded checkpoint's training: runs that resume after a kill, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ms_resampler.tiny.curriculum import Imitating
from ms_resampler.tiny.evaluate import BUDGETS
from ms_resampler.tiny.model import assemble_tiny
from ms_resampler.tiny.peer import with_new_projector
from ms_resampler.tiny.stages import describe_stage, parts_of, read_log, tiny_blind
from ms_resampler.training.trainer import last_checkpoint
from ms_resampler_cli.main import main


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, files in ((9, ["trainer_state.json"]), (10, ["trainer_state.json"]), (11, ["model.safetensors"])):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for file in files:
            (folder / file).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


RUN = """
import dataclasses, sys, torch
from pathlib import Path
from ms_resampler.tiny.curriculum import SceneConversations
from ms_resampler.tiny.model import assemble_tiny
from ms_resampler.tiny.stages import run_stage, tiny_read
torch.set_num_threads(1)
stage = dataclasses.replace(
    tiny_read(steps=6), batch_size=2, save_steps=2, warmup_steps=1, cooldown_steps=2, workers=0,
    dataset=lambda records: SceneConversations(records, drills=4, turns=2),
)
model, processor = assemble_tiny(seed=0)
run_stage(stage, model, processor, Path(sys.argv[1]))
model.save_pretrained(sys.argv[2])
"""


def start_run(*arguments: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, arguments)], env=os.environ, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    assert start_run(tmp_path / "whole", tmp_path / "whole_model").wait() == 0

    killed = start_run(tmp_path / "killed", tmp_path / "killed_model")
    while last_checkpoint(tmp_path / "killed") is None:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed_model").exists()

    assert start_run(tmp_path / "killed", tmp_path / "killed_model").wait() == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole_model", "killed_model"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0, msg=name)


def test_a_stage_opened_again_keeps_its_time_and_its_steps(tmp_path):
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5},
        {"step": 2, "loss": 2.0},
        {"step": 2, "train_runtime": 50.0},
        {"step": 2, "train_runtime": 0.001},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["loss"] for row in read_log(tmp_path) if "loss" in row] == [3.0, 2.0]
    assert describe_stage(tiny_blind(steps=1), tmp_path)["seconds"] == 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_train_command_leaves_a_model_a_record_and_a_card(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "tiny", "--steps", "1", "--scenes", "12", "--out", str(out)]
    assert main(arguments) == 0
    record = json.loads((out / "model" / "training_record.json").read_text())
    assert [(stage["name"], stage["steps"]) for stage in record["stages"]] == [
        (name, 1) for name in ("look", "read", "talk", "count", "blind")
    ]
    assert all(len(stage["data_sha256"]) == 64 for stage in record["stages"])
    assert sum(record["parameters"].values()) > 1_000_000
    assert {row["family"] for row in record["scores"]} == {row["family"] for row in record["blind_scores"]}
    assert {row["what"]: row["count"] for row in record["known_inputs"]["measured"]}["scenes of the test"] == 400
    assert (out / "model" / "known_inputs.safetensors").is_file()
    assert (out / "model" / "curves.png").stat().st_size > 1000
    assert "## What it cannot do" in (out / "model" / "README.md").read_text()
    steps = [json.loads(line) for line in (out / "read" / "log.jsonl").read_text().splitlines()]
    assert all("step" in row for row in steps)

    assert [row["visual_tokens"] for row in record["budget_scores"]] == list(BUDGETS)
    assert {"other words, held out", "absent things"} <= {row["family"] for row in record["wording_scores"]}

    scores = (out / "scores.json").read_text()
    assert main(arguments) == 0  # a finished run runs again at once, with the same results
    assert (out / "scores.json").read_text() == scores


def test_an_earlier_version_gives_tower_language_model_and_teacher(tmp_path):
    earlier, (model, processor) = with_new_projector("ms_resampler_branches", 1), assemble_tiny(0)
    with torch.no_grad():
        earlier.lm_head.weight.add_(1)
    earlier.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    own = {name: weight.clone() for name, weight in model.model.projector.state_dict().items()}
    imitating = Imitating(model.model, parts_of(tmp_path, model, processor))
    weights, expected = model.state_dict(), earlier.state_dict()
    for name, weight in weights.items():
        is_own = name.startswith("model.projector.")
        wanted = own[name.removeprefix("model.projector.")] if is_own else expected[name]
        assert torch.equal(weight, wanted), name

    pixels = torch.rand(2, 3, 96, 96)
    wanted, made = (torch.stack(m.get_image_features(pixels).pooler_output) for m in (earlier, model))
    loss = imitating(pixels)["loss"]
    torch.testing.assert_close(loss, (wanted - made).square().mean() / wanted.var())
    loss.backward()
    assert {name.split(".")[0] for name, w in imitating.named_parameters() if w.grad is not None} == {"projector"}


def test_training_does_not_start_from_another_kind_of_model(tmp_path):
    model, processor = assemble_tiny(0)
    model.config.text_config.rms_norm_eps = 0.5
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has another text_config than the embedded checkpoint"):
        parts_of(tmp_path, assemble_tiny(0)[0], processor)
