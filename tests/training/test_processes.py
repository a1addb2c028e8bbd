"""Two processes on the CPU, launched with the files that users get: the losses of one process, and its weights."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from frozen_parts import PARTS, assert_frozen
from safetensors.torch import load_file
from tiny_runs import losses_of, make_shards, options_in, save_efficientnet, small
from transformers import AutoModelForImageTextToText

from ms_resampler.training.recipes import Adapters
from ms_resampler.training.run import train
from ms_resampler_cli import main as cli

CHANGES = {"batch_size": 8, "steps": 6, "save_steps": 3, "token_budgets": [1, 4, 9]}
ADAPTERS = {"rank": 4, "alpha": 8, "dropout": 0.0}
SCRIPT = Path(__file__).parent.parent / "launched_run.py"


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train(small("instruct", **CHANGES), **options_in(start, out))
    return out


def launcher(name, capsys):
    assert cli.main(["train", "--launcher", name]) == 0
    return capsys.readouterr().out.strip()


def launch(configuration, start, out, recipe="instruct", options=(), **changes):
    """Two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    deepspeed = ["--use_deepspeed", "--num_machines", "1", "--deepspeed_config_file"]
    kind = deepspeed if configuration.endswith(".json") else ["--config_file"]
    command = ["-m", "accelerate.commands.launch", *kind, configuration, "--num_processes", "2"]
    command += ["--main_process_port", str(port), SCRIPT, start, out, recipe]
    command += [json.dumps(CHANGES | changes), json.dumps(dict(options))]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=480,  # DeepSpeed compiles at first
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close_weights(ours, theirs, **tolerance):
    ours, theirs = (
        load_file(next(file for part in ("model", "adapter") for file in (out / part).glob("*.safetensors")))
        for out in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def assert_two_learn_what_one_learns(configuration, start, folder, recipe, **changes):
    """Losses and weights of a run in two processes, and of one in this."""
    launch(configuration, start, folder / "two", recipe, **changes)
    if "adapters" in changes:
        changes["adapters"] = Adapters(**changes["adapters"])
    train(small(recipe, **CHANGES | changes), **options_in(start, folder / "one"))
    torch.testing.assert_close(losses_of(folder / "two"), losses_of(folder / "one"), rtol=1e-4, atol=0)
    assert_close_weights(folder / "two", folder / "one", rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(name, start, alone, tmp_path, capsys):
    out = tmp_path / "two"
    launch(launcher(name, capsys), start, out)
    torch.testing.assert_close(losses_of(out), losses_of(alone), rtol=1e-4, atol=0)
    assert_close_weights(out, alone, rtol=1e-3, atol=2e-5)
    record = json.loads((out / "record.json").read_text())
    assert (record["devices"], record["device_batch"], record["accumulation"]) == (2, 2, 2)
    assert (
        (out / "checkpoint-6" / "pytorch_model_fsdp_0").is_dir(),
        (out / "checkpoint-6" / "optimizer.pt").is_file(),
    ) == ((True, False) if name == "fsdp2" else (False, True))
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-3", "checkpoint-6", "log.jsonl", "model", "record.json",
    ]  # fmt: skip

    files = {file.name for file in (out / "model").iterdir()}
    assert files == {file.name for file in (alone / "model").iterdir()}
    AutoModelForImageTextToText.from_pretrained(out / "model")
    for file in files:  # the same code and configuration
        if file.endswith((".py", "config.json", ".jinja")):
            assert (out / "model" / file).read_text() == (alone / "model" / file).read_text(), file

    again = tmp_path / "again"  # as if it had been killed after step 3
    shutil.copytree(out, again)
    shutil.rmtree(again / "checkpoint-6")
    shutil.rmtree(again / "model")
    launch(launcher(name, capsys), start, again)
    assert_close_weights(again, out, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_share_a_stream_as_two_workers_do(start, tmp_path, capsys):
    ddp, shards = launcher("ddp", capsys), make_shards(start, tmp_path / "shards", 2)
    options = {"data": str(shards), "streaming": True}
    train(small("instruct", workers=2, **CHANGES), **options_in(start, tmp_path / "one", device_batch=2, **options))
    launch(ddp, start, tmp_path / "two", options=options)
    torch.testing.assert_close(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=1e-4, atol=0)
    assert_close_weights(tmp_path / "two", tmp_path / "one", rtol=1e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frozen"),
    [("ddp", ("tower", "llm")), ("ddp", ("projector", "embeddings")), ("fsdp2", ("tower", "embeddings"))],
)
def test_two_processes_leave_what_is_frozen(name, frozen, start, tmp_path, capsys):
    begin = save_efficientnet(tmp_path / "start")
    rates = {part: None if part in frozen else 1e-3 for part in PARTS}
    sizes = {"token_budgets": [], "steps": 3}
    launch(launcher(name, capsys), start, tmp_path / "run", options={"model": str(begin)}, rates=rates, **sizes)
    assert_frozen(set(frozen), begin, tmp_path / "run" / "model")


@pytest.mark.slow
def test_two_processes_fill_one_folder_of_features(start, tmp_path, capsys):
    """With and without pictures that both see, since an epoch ends in the middle."""
    ddp, kept = launcher("ddp", capsys), tmp_path / "kept"
    launch(ddp, start, tmp_path / "plain")
    launch(ddp, start, tmp_path / "cached", options={"features": str(kept)})
    assert_close_weights(tmp_path / "cached", tmp_path / "plain", rtol=0, atol=0)
    files = [file for file in kept.rglob("*") if file.is_file()]
    assert len(files) >= 18
    assert {file.suffix for file in files} == {".safetensors"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_learn_adapters_over_four_bits_as_one_does(name, start, tmp_path, capsys):
    changes = {"steps": 3, "warmup_ratio": 0, "adapters": ADAPTERS | {"four_bits": True}}
    assert_two_learn_what_one_learns(launcher(name, capsys), start, tmp_path, "instruct_qlora", **changes)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("recipe", ["instruct", "instruct_lora", "instruct_qlora"])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_processes_of_deepspeed_learn_what_one_learns(name, recipe, start, tmp_path, capsys):
    adapters = {"adapters": ADAPTERS | {"four_bits": recipe == "instruct_qlora"}} if recipe != "instruct" else {}
    assert_two_learn_what_one_learns(launcher(name, capsys), start, tmp_path, recipe, **adapters)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeeds_files_leave_to_the_recipe_what_is_the_recipes(name, stage, capsys):
    """Read as accelerate reads it."""
    configuration = HfDeepSpeedConfig(launcher(name, capsys))
    assert (configuration._stage, configuration.is_zero3(), configuration.is_offload()) == (stage, stage == 3, False)
    ours = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {configuration.get_value(key) for key in (*ours, "bf16.enabled")} == {"auto"}
    assert not {"optimizer", "scheduler", "fp16"} & configuration.config.keys()
    if stage == 3:  # or the result would hold no weights
        assert configuration.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_launch_files_leave_the_precision_to_the_recipe(name, capsys):
    configuration = load_config_from_file(launcher(name, capsys))
    assert configuration.mixed_precision == "no"
    assert configuration.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[name]
