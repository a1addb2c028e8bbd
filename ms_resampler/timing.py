"""The time and the memory that a run takes."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def milliseconds(run: Callable[[], object]) -> float:
    """How long a run takes, the device's queue included, but for what was in it before."""
    wait_for_device()
    start = time.perf_counter()
    run()
    wait_for_device()
    return 1000 * (time.perf_counter() - start)


def wait_for_device() -> None:
    """Returns when a GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(run: Callable[[], object]) -> int:
    """The bytes that tensors of a run take at most, beside what was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(
            activities=cpu, profile_memory=True, on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace))
        ):
            run()
        rows = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    first = min(rows, key=lambda row: row["ts"])["args"]
    return max(row["args"]["Total Allocated"] for row in rows) - (first["Total Allocated"] - first["Bytes"])
