"""Every projector side by side, at its published sizes: 24 x 24 patches of 1024 channels -> 144 tokens -> width 4096.

    python -m research.benchmarks.projectors   float32, batch 1, forward: all projectors
    python -m research.benchmarks.projectors --suite --json costs.json --plot costs.png   budgets, batches, dtypes
    python -m research.benchmarks.projectors --tokens 64 --batch 8 --dtype bfloat16 --backward --projectors mqt
    python -m research.benchmarks.projectors --packed --batch 1 8 32   packed weights, on a CPU
    python -m research.benchmarks.projectors --graphs --dtype bfloat16 --batch 1 8 32   as CUDA graphs, on a GPU
    python -m research.benchmarks.projectors --compile --graphs --dtype bfloat16 --projectors mlp   and compiled

Every combination is a setting of its own, and prints one markdown table: parameters, multiply-accumulates of the run,
median milliseconds over interleaved repeats (and their spread), relative to our single-scope and multi-scope
resamplers (medians of the ratios of times in the same round), the share of the floor, and the most that tensors took
beside the weights. The floor is the time of the run's multiply-accumulates at the rate of a product of large square
matrices, measured first, or of reading the weights and patches once at the rate of a copy, whichever is longer.
A projector stops after `--seconds`, but is repeated at least three times. `--json` keeps the numbers,
`--plot` draws them.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import nn

from ms_resampler import MSResamplerConfig
from ms_resampler.folders import write_whole
from ms_resampler.packing_ms_resampler import pack_linears
from ms_resampler.projectors_ms_resampler import build_projector, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights
from ms_resampler.training.step_time import milliseconds, peak_memory

from ..timing import count_macs, in_turn, machine, markdown_table, rates, spread, times_as_long
from ..variants import configuration

GRID, TOKENS, TEXT_WIDTH = 24, 144, 4096
SWEPT = {"tokens": "visual tokens", "batch": "images", "grid": "patches a side"}  # what the plot's lines vary
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# AVX2 has no bfloat16 instructions: products are emulated, several times slower than float32.
HALF = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
# Sizes of the publications: projector fields, and the tower's layers where there are several.
PUBLISHED: dict[str, dict[str, Any]] = {
    "resampler": {},
    "resampler, local": {"scope_sigmas": [0.5], "query_init": "none"},  # ms_resampler with one scope
    "ms_resampler": {},
    "ms_resampler, 1024 wide": {"hidden_size": 1024},
    "ms_resampler, moving scopes": {"moving_scopes": True},
    "ms_resampler, learned queries": {"query_init": "learned"},
    "ms_resampler, branches": {"scope_layout": "branches", "fusion": "head", "cell_residual": False},
    "mlp": {},
    "avg_pool": {},
    "pixel_shuffle": {},
    "c_abstractor": {"num_hidden_layers": 3},
    "d_abstractor": {"num_hidden_layers": 6, "num_attention_heads": 8},
    "ldp": {},
    "ldp_v2": {},
    "token_packer": {"num_attention_heads": 8, "layers": [12, 16, 22, 23]},
    "delta_llava": {"num_attention_heads": 8, "layers": [12, 16, 22, 23]},
    "mqt": {"query_grid": [16, 16]},
    "llava_mini": {"num_attention_heads": 8},
    "saep": {"layers": [9, 13, 17, 20, 22]},
    "qwen_resampler": {"hidden_size": 4096, "num_attention_heads": 32},
    "perceiver": {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6},
    "idefics2_perceiver": {
        "hidden_size": 1536,
        "num_attention_heads": 16,
        "num_hidden_layers": 3,
        "intermediate_size": 14336,
    },
    "q_former": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is measured: patches a side, visual tokens, images, dtype, and whether gradients are computed too."""

    grid: int = GRID
    tokens: int = TOKENS
    batch: int = 1
    dtype: str = "float32"
    backward: bool = False
    compiled: bool = False
    recorded: bool = False
    packed: bool = False

    @property
    def token_grid(self) -> tuple[int, int]:
        side = round(self.tokens**0.5)
        return side, side

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        what += (", compiled" if self.compiled else "") + (", CUDA graph" if self.recorded else "")
        what += ", packed" if self.packed else ""
        return f"{self.grid} x {self.grid} patches -> {self.tokens} tokens, {self.dtype}, batch {self.batch}, {what}"


def published_config(name: str, setting: Setting) -> MSResamplerConfig:
    """CLIP-L/14 and a language model of width 4096, with a projector at its published sizes."""
    fields = dict(PUBLISHED[name])
    layers = fields.pop("layers", -2)
    tokens = (setting.grid, setting.grid) if name == "mlp" else setting.token_grid
    return MSResamplerConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 14 * setting.grid,
            "patch_size": 14,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        text_config={"model_type": "llama", "hidden_size": TEXT_WIDTH, "num_attention_heads": 32},
        projector_config=configuration(
            {"projector_type": name.split(",")[0], "visual_tokens": tokens, "query_grid": tokens, **fields}
        ),
        vision_feature_layer=layers,
    )


# The settings of `--suite`, each of which changes one thing in the first. The largest projectors are measured only
# where they are affordable.
EVERY = list(PUBLISHED)
AFFORDABLE = [name for name in EVERY if name != "idefics2_perceiver"]
WHOLE_CELLS = ["pixel_shuffle", "ldp", "saep", "token_packer", "delta_llava"]  # not 16 x 16 of 24 x 24 patches
RIVALS = ["mlp", "c_abstractor", "ldp_v2", "token_packer", "mqt", "perceiver"]
BASES = ["resampler", "ms_resampler", "ms_resampler, 1024 wide"]  # references of the tables
OURS = [*BASES, "resampler, local", "ms_resampler, learned queries"]
SUITE: list[tuple[list[str], Setting]] = [
    *((EVERY, Setting(tokens=tokens)) for tokens in (144, 64, 36)),
    ([name for name in EVERY if name not in WHOLE_CELLS], Setting(tokens=256)),
    (AFFORDABLE, Setting(batch=8)),
    (OURS + RIVALS, Setting(batch=32)),
    (AFFORDABLE, Setting(backward=True)),
    (OURS + RIVALS, Setting(batch=8, backward=True)),
    ([*OURS, "mqt"], Setting(batch=32, backward=True)),
    (OURS + RIVALS, Setting(dtype="bfloat16")),
    ([*OURS, "mqt"], Setting(batch=8, dtype="bfloat16")),
    ([*OURS, "mqt"], Setting(dtype="bfloat16", backward=True)),
    *(([*OURS, "mlp", "token_packer", "mqt"], Setting(grid=grid)) for grid in (36, 48, 72, 96)),
]


def make_run(name: str, setting: Setting, device: str = DEVICE) -> tuple[nn.Module, Callable[[], object]]:
    """A projector and its run on fixed random features: forward alone, or with the gradients of all parameters."""
    config, dtype = published_config(name, setting), getattr(torch, setting.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        projector = build_projector(config).to(dtype)
        x_BNC = torch.randn(setting.batch, setting.grid**2, config.feature_width, dtype=dtype)
    projector.apply(init_resampler_weights).apply(init_projector_weights)
    if setting.packed:
        pack_linears(projector)
        if any(type(part) is nn.Linear for part in projector.modules()):
            raise SystemExit(f"--packed: there are no packed weights for {setting.dtype} on this processor.")
    patch_grid = (setting.grid, setting.grid)
    token_grid = patch_grid if name == "mlp" else setting.token_grid
    project = torch.compile(projector, dynamic=False) if setting.compiled else projector
    projector.train(setting.backward)

    def run() -> None:
        projector.zero_grad()
        with torch.set_grad_enabled(setting.backward):
            y = project(x_BNC, patch_grid, token_grid)
        if setting.backward:
            (y[0] if isinstance(y, tuple) else y).sum().backward()

    return projector, run


def record(run: Callable[[], object]) -> Callable[[], object]:
    """A forward pass as a CUDA graph, which starts all its kernels at once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cost(name: str, setting: Setting = Setting()) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of the run, counted on the meta device if the code does not read values."""
    plain = replace(setting, compiled=False, packed=False)
    projector, run = make_run(name, plain, DEVICE if name == "idefics2_perceiver" else "meta")
    projector.requires_grad_(setting.backward)  # the counter does not support gradients
    return sum(weight.numel() for weight in projector.parameters()), count_macs(run)


def floor_ms(setting: Setting, parameters: int, macs: int, mac_rate: float, byte_rate: float) -> float:
    """The floor of a run: its operations, or reading weights and patches; three times that with gradients."""
    passes, size = 3 if setting.backward else 1, getattr(torch, setting.dtype).itemsize
    moved = passes * size * (parameters + setting.batch * setting.grid**2 * 1024)
    return 1000 * max(macs / mac_rate, moved / byte_rate)


def measure(setting: Setting, names: list[str], repeats: int, seconds: float = math.inf) -> list[dict[str, Any]]:
    """A row of numbers for every projector in a setting."""
    speed = rates(getattr(torch, setting.dtype))
    runs = {name: make_run(name, setting)[1] for name in names}
    for run in runs.values():
        run()  # what compiles does so now
    peaks = {name: peak_memory(run) for name, run in runs.items()}
    if setting.recorded:
        runs = {name: record(run) for name, run in runs.items()}
    times = in_turn({name: partial(milliseconds, run) for name, run in runs.items()}, repeats, seconds)
    rows = []
    for name, spent in times.items():
        parameters, macs = cost(name, setting)
        sizes = {"parameters": parameters, "macs": macs, "peak_bytes": peaks[name]}
        rows.append({"projector": name, "ms": spent, "floor_ms": floor_ms(setting, parameters, macs, *speed), **sizes})
    return rows


def ratio_cell(row: dict[str, Any], rows: list[dict[str, Any]], base: str) -> str:
    """A row's time relative to another projector in the same rounds; empty if that was not measured."""
    others = [other["ms"] for other in rows if other["projector"] == base]
    return "".join(f"{times_as_long(row['ms'], other):.2f}" for other in others)


def digits(ms: float) -> int:
    """Decimals of milliseconds in a table: more for small values."""
    return 1 if ms > 10 else 3


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    columns = ["projector", "parameters (M)", "GMAC", "median ms", "spread", *(f"x {base}" for base in BASES)]
    lines = []
    for row in rows:
        median = statistics.median(row["ms"])
        cells = [row["projector"], f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}"]
        cells += [f"{median:.{digits(median)}f}", spread(row["ms"], digits(median))]
        cells += [*(ratio_cell(row, rows, base) for base in BASES)]
        cells += [f"{row['floor_ms'] / median:.0%}", f"{row['peak_bytes'] / 1e6:.1f}"]
        lines.append(cells)
    return markdown_table([*columns, "share of the floor", "peak (MB)"], lines)


def summary(results: list[dict[str, Any]]) -> str:
    """All settings in markdown: what ms_resampler takes, and how many times as long the others do in the same round."""
    others = [name for name in [*OURS, *RIVALS] if name != "ms_resampler"]
    lines = []
    for result in results:
        rows = {row["projector"]: row for row in result["rows"]}
        ours = rows["ms_resampler"]
        median = statistics.median(ours["ms"])
        cells = [str(Setting(**result["setting"])), f"{median:.{digits(median)}f}", f"{ours['floor_ms'] / median:.0%}"]
        ratios = [ratio_cell(rows[name], result["rows"], "ms_resampler") if name in rows else "" for name in others]
        lines.append(cells + ratios)
    return markdown_table(["setting", "ms_resampler, ms", "share of the floor", *others], lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Median milliseconds: bars for the first setting, and lines over what varies beside it."""
    first, swept = results[0]["setting"], [axis for axis in SWEPT if len(along(results, axis)) > 1]
    figure, axes = plt.subplots(
        1, 1 + len(swept), figsize=(6 + 4 * len(swept), 4.5), squeeze=False, layout="constrained"
    )
    draw_bars(axes[0][0], results[0]["rows"], str(Setting(**first)))
    for axis, name in zip(axes[0][1:], swept, strict=True):
        draw_lines(axis, along(results, name), name)
    if swept:
        lines = {line.get_label(): line for axis in axes[0][1:] for line in axis.get_lines()}
        figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def along(results: list[dict[str, Any]], axis: str) -> dict[int, list[dict[str, Any]]]:
    """The rows of the settings that differ from the first only in this field, by its value."""
    first = Setting(**results[0]["setting"])
    found = {
        result["setting"][axis]: result["rows"]
        for result in results
        if Setting(**result["setting"]) == replace(first, **{axis: result["setting"][axis]})
    }
    return dict(sorted(found.items()))


def is_ours(name: str) -> bool:
    return name.split(",")[0] in ("resampler", "ms_resampler")


def draw_bars(axis: Any, rows: list[dict[str, Any]], title: str) -> None:
    names, medians = [row["projector"] for row in rows], [statistics.median(row["ms"]) for row in rows]
    bars = axis.barh(names, medians, color=["tab:blue" if is_ours(name) else "tab:grey" for name in names])
    axis.bar_label(bars, [f"{ms:.{0 if ms > 10 else 1}f}" for ms in medians], padding=2)
    axis.set(xscale="log", xlabel="milliseconds", xlim=(min(medians) / 2, 3 * max(medians)))
    axis.set_title(title, fontsize=8)
    axis.invert_yaxis()


def draw_lines(axis: Any, rows_by_value: dict[int, list[dict[str, Any]]], label: str) -> None:
    """A line for every projector that was measured at each value, of ours and of those that ours are compared with."""
    medians = [{row["projector"]: statistics.median(row["ms"]) for row in rows} for rows in rows_by_value.values()]
    colours = [*(plt.get_cmap("tab10")(number) for number in range(10)), "black"]
    for colour, name in zip(colours, [*OURS, *RIVALS], strict=True):
        if all(name in some for some in medians):
            style = {"linewidth": 2.5, "linestyle": "-"} if is_ours(name) else {"linewidth": 1, "linestyle": "--"}
            line = [some[name] for some in medians]
            axis.plot(list(rows_by_value), line, marker="o", label=name, color=colour, **style)
    axis.set(xscale="log", yscale="log", xlabel=SWEPT[label], ylabel="milliseconds")
    axis.set_xticks(list(rows_by_value), list(map(str, rows_by_value)), minor=False)
    axis.minorticks_off()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projectors", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME")
    parser.add_argument("--grid", type=int, nargs="+", default=[GRID], help="patches a side")
    parser.add_argument("--tokens", type=int, nargs="+", default=[TOKENS], help="visual tokens, a square number")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--backward", action="store_true", help="with the gradients of all parameters")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which fuses kernels")
    parser.add_argument("--graphs", action="store_true", help="as CUDA graphs, forward alone, on a GPU")
    parser.add_argument("--packed", action="store_true", help="with packed weights, forward alone, on a CPU")
    parser.add_argument(
        "--suite", action="store_true", help="all settings: budgets, batches, dtypes, grids; other options rest"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=5, help="of a projector in a setting, three repeats apart")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    if asked.graphs and (asked.backward or DEVICE == "cpu"):
        parser.error("--graphs records the forward pass on a GPU: leave out --backward, and have a GPU.")
    if asked.packed and (asked.backward or asked.compile or DEVICE != "cpu"):
        parser.error("--packed measures the forward pass on a CPU: leave out --backward and --compile, hide the GPU.")
    return asked


def chosen(asked: argparse.Namespace) -> list[tuple[list[str], Setting]]:
    """The projectors and settings to measure; the suite's bfloat16 settings only on processors that support it."""
    if asked.suite:
        return [(names, setting) for names, setting in SUITE if setting.dtype == "float32" or HALF]
    combinations = product(asked.grid, asked.tokens, asked.batch, asked.dtype)
    how = asked.backward, asked.compile, asked.graphs, asked.packed
    return [(asked.projectors, Setting(*values, *how)) for values in combinations]


def main() -> None:
    """Measures, prints and keeps."""
    asked, results = arguments(), []
    print(machine())
    for names, setting in chosen(asked):
        rows = measure(setting, names, asked.repeats, asked.seconds)
        print(f"\n{setting}\n\n{table(rows)}", flush=True)
        results.append({"setting": asdict(setting), "machine": machine(), "rows": rows})
        if asked.json:
            write_whole(asked.json, json.dumps(results, indent=1))
    if asked.suite:
        print(f"\nTimes as long as ms_resampler\n\n{summary(results)}")
    if asked.plot:
        draw(results, asked.plot)


if __name__ == "__main__":
    main()
