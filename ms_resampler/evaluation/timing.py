"""What a cost is measured with: the machine in one line, multiply-accumulates, and times of several runs in turn."""

import platform
import time
from collections.abc import Callable, Mapping

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def machine() -> str:
    """The machine and the versions that the times belong to."""
    return (
        f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of a run's products of matrices, attention included."""
    # Attention counts only where it is spelled out as products of matrices.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every run, `repeats` times in turn, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start))
    return times
