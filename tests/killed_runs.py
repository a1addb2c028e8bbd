"""Runs in a process of their own, to be killed, and their weights: python killed_runs.py START OUT CHANGES OPTIONS."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import options_in, small

from ms_resampler.training.run import train


def start_run(start: Path, out: Path, changes: dict, options: dict | None = None, **popen) -> subprocess.Popen:
    """A run of `instruct` that knows a token, two records at a time."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_TOKEN": "hf_" + "s3cret" * 6}
    command = [sys.executable, __file__, str(start), str(out), json.dumps(changes), json.dumps(options or {})]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **popen)


def finish(run: subprocess.Popen) -> None:
    """Waits for the end, which must be a good one."""
    error = run.communicate()[1]
    assert run.returncode == 0, error[-2000:]


def kill_at(run: subprocess.Popen, out: Path, when: Callable) -> None:
    """kill -9 as soon as `when()` is true."""
    while not when():
        assert run.poll() is None, run.communicate()[1][-2000:]
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not (out / "model").exists()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a model's folder."""
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Bit for bit."""
    ours, theirs = weights(ours / "model"), weights(theirs / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


if __name__ == "__main__":
    torch.set_num_threads(1)
    changes, options = map(json.loads, sys.argv[3:])
    train(small("instruct", **changes), **options_in(Path(sys.argv[1]), Path(sys.argv[2]), device_batch=2, **options))
