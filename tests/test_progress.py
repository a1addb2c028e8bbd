"""Progress in a terminal and in a log file."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from components import save_llm, save_tower
from tiny_runs import make_start, options_in, small
from tqdm import tqdm

from ms_resampler import progress as module
from ms_resampler.progress import progress
from ms_resampler.training.run import train


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    times = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: times[0]))
    return times


def count(clock, number, seconds, **options):
    """Progress that makes `number` updates, `seconds` apart."""
    with progress(total=number, desc="records", **options) as bar:
        for _ in range(number):
            clock[0] += seconds
            bar.update()
        assert bar.n == number


def test_a_log_file_gets_a_line_every_half_minute(clock, capsys):
    count(clock, 1000, 0.125)
    assert capsys.readouterr().err.splitlines() == [
        "records: 240 of 1000 after 00:30, 01:35 left",
        "records: 480 of 1000 after 01:00, 01:05 left",
        "records: 720 of 1000 after 01:30, 00:35 left",
        "records: 960 of 1000 after 02:00, 00:05 left",
    ]
    count(clock, 1000, 0.02)
    count(clock, 1000, 5, disable=True)
    assert capsys.readouterr().err == ""


def test_sizes_have_units_and_a_stream_has_no_total(clock, capsys):
    for total in (8_000_000, None):
        with progress(total=total, unit="B", unit_scale=True, desc="file") as bar:
            clock[0] += 40
            bar.update(2_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "file: 2.00M of 8.00M after 00:40, 02:00 left",
        "file: 2.00M after 00:40",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(total=3, desc="records") as bar:
        assert isinstance(bar, tqdm)


def test_a_run_in_a_log_file_says_how_far_it_is(tmp_path, clock, capfd, monkeypatch):
    start = make_start(tmp_path, records=4)
    monkeypatch.setattr(module, "SECONDS", 0)
    train(small("align", steps=2, batch_size=2, bad_records="skip"), **options_in(start, tmp_path / "run"))
    told = capfd.readouterr()
    steps = [line for line in told.err.splitlines() if line.startswith("training steps")]
    assert [line.split(" after")[0] for line in steps] == ["training steps: 1 of 2", "training steps: 2 of 2"]
    assert "loss" not in told.out  # log.jsonl has it


@pytest.mark.slow
def test_a_command_leaves_no_bar_in_a_log_file(tmp_path):
    """Nor do the libraries, which show one for the weights that they load."""
    tower, llm = save_tower(tmp_path / "clip"), save_llm(tmp_path / "qwen2")
    command = ["-m", "ms_resampler_cli.main", "init", "--vision", tower, "--llm", llm, "--out", tmp_path / "model"]
    command += ["--visual-tokens", "4", "--set", "hidden_size=32", "--set", "num_attention_heads=4"]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True)
    assert "%|" not in done.stderr
    assert "\r" not in done.stderr
