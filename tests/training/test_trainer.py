"""Training: labels on the answers only, runs that go on after a kill, and what a run leaves behind."""

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
from tiny_models import picture, tiny_processor

from ms_resampler.tiny.record import describe_stage, read_log
from ms_resampler.tiny.train import last_checkpoint
from ms_resampler.training.collate import IGNORED, ConversationCollator, messages_of
from ms_resampler.training.recipes import tiny_blind


def conversation(name, image, turns):
    """A record in LLaVA's format."""
    said = [{"from": who, "value": value} for turn in turns for who, value in zip(("human", "gpt"), turn, strict=True)]
    if image is not None:
        said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": name, "image": image, "conversations": said}


def test_messages_before_and_after():
    record = {
        "id": "a",
        "image": [picture(0), picture(1)],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich is older?"},
            {"from": "gpt", "value": "The first."},
            {"from": "human", "value": "Why?"},
        ],
    }
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    assert messages_of(record) == [
        {"role": "user", "content": [image, image, text("Which is older?")]},
        {"role": "assistant", "content": [text("The first.")]},
        {"role": "user", "content": [text("Why?")]},
    ]


def test_a_record_with_too_few_images_is_named():
    record = {"id": "b7", "image": None, "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}
    with pytest.raises(ValueError, match="Record b7 has 1 <image> placeholders, but 0 images"):
        messages_of(record)


def test_labels_are_the_answers_and_their_end_and_nothing_else():
    processor = tiny_processor()
    records = [
        conversation("one", picture(0), [("What?", "a cat"), ("Where?", "on the mat")]),
        conversation("two", picture(1), [("Who?", "me")]),
    ]
    batch = ConversationCollator(processor, max_length=500)(records)
    learned = [processor.tokenizer.decode(row[row != IGNORED].tolist()).replace(" ", "") for row in batch["labels"]]
    assert learned == ["acat<|im_end|>onthemat<|im_end|>", "me<|im_end|>"]
    kept = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert (batch["input_ids"][~batch["attention_mask"].bool()] == processor.tokenizer.pad_token_id).all()
    assert batch["pixel_values"].shape[0] == 2
    alone = ConversationCollator(processor, max_length=500)(records[1:])
    length = alone["labels"].shape[1]
    assert torch.equal(batch["labels"][1, :length], alone["labels"][0])


def test_text_only_records_and_mixed_batches():
    records = [conversation("text", None, [("Who?", "me")]), conversation("image", picture(0), [("What?", "cat")])]
    batch = ConversationCollator(tiny_processor(), max_length=500)(records)
    assert batch["pixel_values"].shape[0] == 1
    assert "pixel_values" not in ConversationCollator(tiny_processor(), max_length=500)(records[:1])


@pytest.mark.parametrize(
    ("turns", "length", "sentence"),
    [
        ([("What?", "x" * 300)], 200, r"Record long has \d+ tokens, more than 200"),
        ([], 200, "Record long has no answer to learn from"),
    ],
)
def test_records_that_would_be_cut_or_masked_out_are_named(turns, length, sentence):
    record = conversation("long", picture(0), turns or [("What?", "")])
    record["conversations"] = record["conversations"][: 2 * len(turns) or 1]
    with pytest.raises(ValueError, match=sentence):
        ConversationCollator(tiny_processor(), max_length=length)([record])


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
from ms_resampler.training.recipes import tiny_read
from ms_resampler.training.tiny_model import assemble_tiny
from ms_resampler.tiny.train import train
torch.set_num_threads(1)
stage = dataclasses.replace(
    tiny_read(steps=6), batch_size=2, save_steps=2, warmup_steps=1, cooldown_steps=2, workers=0,
    dataset=lambda records: SceneConversations(records, drills=4, turns=2),
)
model, processor = assemble_tiny(seed=0)
train(stage, model, processor, Path(sys.argv[1]))
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


def test_a_finished_stage_that_is_opened_again_keeps_its_time_and_counts_no_step_twice(tmp_path):
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
    from ms_resampler_cli.main import main

    out = tmp_path / "run"
    arguments = ["train", "tiny", "--steps", "2", "--scenes", "12", "--out", str(out)]
    assert main(arguments) == 0
    record = json.loads((out / "model" / "training_record.json").read_text())
    assert [(stage["name"], stage["steps"]) for stage in record["stages"]] == [("look", 2), ("read", 2), ("blind", 2)]
    assert all(len(stage["data_sha256"]) == 64 for stage in record["stages"])
    assert sum(record["parameters"].values()) > 1_000_000
    assert {row["family"] for row in record["scores"]} == {row["family"] for row in record["blind_scores"]}
    assert (out / "model" / "curves.png").stat().st_size > 1000
    assert "## What it cannot do" in (out / "model" / "README.md").read_text()
    steps = [json.loads(line) for line in (out / "read" / "log.jsonl").read_text().splitlines()]
    assert all("step" in row for row in steps)

    scores = (out / "scores.json").read_text()
    assert main(arguments) == 0  # a finished run runs again at once, with the same results
    assert (out / "scores.json").read_text() == scores
