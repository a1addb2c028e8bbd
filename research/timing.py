"""Benchmark tools: the machine and its rates, multiply-accumulates, interleaved runs, and tables."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ms_resampler.packing_ms_resampler import PackedLinear, pack_linears
from ms_resampler.training.step_time import milliseconds

Result = TypeVar("Result")

LEAST = 3  # repeats, however long they take


def machine() -> str:
    """Describes the machine, its GPU if there is one, and the versions."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{gpu}{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def count_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of a run's matrix products, including attention; also on the meta device."""
    # Attention is counted only if it is written as matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_flop_counts()["Global"]
    convolution, gradients = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
    if gradients in flops:  # counted as if it had no groups
        flops[gradients] = 2 * flops[convolution]
    return sum(flops.values()) // 2


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """This machine's multiply-accumulates a second, in a product of large matrices, and bytes a second, in a copy.

    On a CPU the faster of two products: as torch does it, and with one matrix packed.
    """
    side, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    linear = nn.Sequential(nn.Linear(side, side, bias=False, dtype=dtype, device=device)).requires_grad_(False)
    pack_linears(linear)
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], object]] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    if isinstance(linear[0], PackedLinear):
        runs["packed"] = lambda: linear(a)
    best = {name: min(spent) / 1000 for name, spent in interleaved(runs, 5).items()}
    return side**3 / min(best["product"], best.get("packed", math.inf)), 2 * source.numel() / best["copy"]


def in_turn(
    runs: Mapping[str, Callable[[], Result]], repeats: int, seconds: float = math.inf
) -> dict[str, list[Result]]:
    """The results of runs, interleaved `repeats` times; a run that has used its `seconds` stops after `LEAST` times."""
    results: dict[str, list[Result]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for repeat in range(repeats):
        for name, run in runs.items():
            if repeat < LEAST or spent[name] < seconds:
                start = time.perf_counter()
                results[name].append(run())
                spent[name] += time.perf_counter() - start
    return results


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every run, in turn as by `in_turn`, after a round that warms up."""
    for run in runs.values():
        run()
    return in_turn({name: partial(milliseconds, run) for name, run in runs.items()}, repeats)


def times_as_long(spent: Sequence[float], base: Sequence[float]) -> float:
    """The ratio of two runs' times: the median over the rounds that include both."""
    return statistics.median(one / other for one, other in zip(spent, base, strict=False))


def spread(values: list[float], digits: int = 0) -> str:
    """Minimum and maximum, for a table."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells in Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])
