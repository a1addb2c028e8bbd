"""The forms of the Gaussian prior side by side: taken by rows and columns, as appended channels, or a bias on scores.

    python -m research.benchmarks.prior_form            576 x 1024 -> 144 -> 4096, float32 and bfloat16, batch 1 and 8

Prints one markdown table: median milliseconds over interleaved repeats (and their spread), relative to one global
scope without a prior in the same run, and the error of the output against float64. `--patches` and `--tokens` are
sides of squares.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch

from ms_resampler.projectors_ms_resampler import SCOPED_PROJECTORS, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights

from ..timing import interleaved, machine
from ..variants import configuration

FORMS: dict[str, dict[str, Any]] = {
    "one global scope with queries": {"projector_type": "resampler", "scope_prior": "none"},
    "three, rows and columns": {},
    "three, bias": {"prior_form": "bias"},
    "three with queries, channels": {"query_init": "learned"},
    "three with queries, bias": {"query_init": "learned", "prior_form": "bias"},
}
Grids = tuple[tuple[int, int], tuple[int, int]]


def build(form: str) -> torch.nn.Module:
    """A resampler of a form, with the same weights for both forms with queries, and for both without."""
    torch.manual_seed(0)
    config = configuration(FORMS[form])
    resampler = SCOPED_PROJECTORS[config.projector_type](config, 1024, 4096)
    return resampler.apply(init_resampler_weights).apply(init_projector_weights)


def run(resampler: torch.nn.Module, x: torch.Tensor, grids: Grids, backward: bool) -> None:
    """Forward alone, or with the gradients of all parameters."""
    with torch.set_grad_enabled(backward):
        y, _ = resampler(x, *grids)
    if backward:
        y.sum().backward()


def error(form: str, dtype: torch.dtype, x: torch.Tensor, grids: Grids) -> float:
    """Relative error of the output in a dtype against float64."""
    with torch.no_grad():
        exact, _ = build(form).double()(x.double(), *grids)
        y, _ = build(form).to(dtype)(x.to(dtype), *grids)
    return ((y.double() - exact).norm() / exact.norm()).item()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--patches", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    print("| dtype | batch | pass | " + " | ".join(FORMS) + " | errors but of the first |")
    print("|---|---|---|" + "---|" * (len(FORMS) + 1))
    grids = (arguments.patches,) * 2, (arguments.tokens,) * 2
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        errors = [error(form, dtype, torch.randn(1, arguments.patches**2, 1024), grids) for form in list(FORMS)[1:]]
        for batch in arguments.batch:
            for backward in (False, True):
                row(
                    torch.randn(batch, arguments.patches**2, 1024, dtype=dtype),
                    grids,
                    backward,
                    arguments.repeats,
                    errors,
                )


def row(x: torch.Tensor, grids: Grids, backward: bool, repeats: int, errors: list[float]) -> None:
    """One line of the table."""
    resamplers = {form: build(form).to(x.dtype) for form in FORMS}
    runs = {form: partial(run, resampler, x, grids, backward) for form, resampler in resamplers.items()}
    times = interleaved(runs, repeats)
    base = statistics.median(times["one global scope with queries"])
    cells = [
        f"{middle:.1f} ms ({min(spent):.1f} to {max(spent):.1f}), x{middle / base:.2f}"
        for spent in times.values()
        for middle in [statistics.median(spent)]
    ]
    of = f"| {str(x.dtype).removeprefix('torch.')} | {len(x)} | {'forward + backward' if backward else 'forward'} | "
    print(of + " | ".join(cells) + " | " + ", ".join(f"{e:.1e}" for e in errors) + " |", flush=True)


if __name__ == "__main__":
    main()
