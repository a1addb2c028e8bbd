"""Every projector side by side, at its published sizes: 24 x 24 patches of 1024 channels -> 144 tokens -> width 4096.

    python benchmarks/projectors.py                                          float32, batch 1, forward
    python benchmarks/projectors.py --tokens 256 144 64 36 --batch 1 8 --dtype float32 bfloat16 --backward
    python benchmarks/projectors.py --grid 24 48 96 --projectors resampler ms_resampler "ms_resampler, branches"

Every combination is a setting of its own, and prints one markdown table: parameters, multiply-accumulates of one image,
median milliseconds over interleaved repeats (and their spread), relative to our single-scope resampler in the same
run, the share of the floor, and the most that tensors took beside the weights. The floor is the time of the
multiply-accumulates at the rate of a product of large square matrices, measured first, or of reading the weights
and patches once at the rate of a copy, whichever is longer. `--json` keeps the numbers, `--plot` draws them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import nn

from ms_resampler import MSResamplerConfig
from ms_resampler.evaluation.timing import count_macs, interleaved, machine
from ms_resampler.projectors_ms_resampler import build_projector, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights
from ms_resampler.study.results import write_whole
from ms_resampler.training.measure import memory_trace, peak_bytes

GRID, TOKENS, TEXT_WIDTH = 24, 144, 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Sizes of the publications: projector fields, and the tower's layers where there are several.
PUBLISHED: dict[str, dict[str, Any]] = {
    "resampler": {},
    "ms_resampler": {},
    "ms_resampler, 768 wide": {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12},
    "ms_resampler, branches": {"scope_layout": "branches", "fusion": "head", "cell_residual": False},
    "mlp": {},
    "avg_pool": {},
    "pixel_shuffle": {},
    "c_abstractor": {"num_hidden_layers": 3},
    "ldp_v2": {},
    "token_packer": {"num_attention_heads": 8, "layers": [12, 16, 22, 23]},
    "mqt": {"query_grid": [16, 16]},
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

    @property
    def token_grid(self) -> tuple[int, int]:
        side = round(self.tokens**0.5)
        return side, side

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
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
        projector_config={"projector_type": name.split(",")[0], "visual_tokens": tokens, **fields},
        vision_feature_layer=layers,
    )


def make_run(name: str, setting: Setting) -> tuple[nn.Module, Callable[[], object]]:
    """A projector and its run on fixed random features: forward alone, or with the gradients of all parameters."""
    config, dtype = published_config(name, setting), getattr(torch, setting.dtype)
    torch.manual_seed(0)
    projector = build_projector(config).apply(init_resampler_weights).apply(init_projector_weights).to(DEVICE, dtype)
    patch_grid, token_grid = (setting.grid, setting.grid), tuple(config.projector_config.visual_tokens)
    x_BNC = torch.randn(setting.batch, setting.grid**2, config.feature_width, dtype=dtype, device=DEVICE)

    def run() -> None:
        projector.zero_grad()
        with torch.set_grad_enabled(setting.backward):
            y = projector.train(setting.backward)(x_BNC, patch_grid, token_grid)
        if setting.backward:
            (y[0] if isinstance(y, tuple) else y).sum().backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return projector, run


def cost(name: str, setting: Setting = Setting()) -> tuple[int, int]:
    """Parameters, and multiply-accumulates of one image."""
    projector, run = make_run(name, Setting(setting.grid, setting.tokens))
    projector.requires_grad_(False)  # or the counter would wait for gradients
    return sum(weight.numel() for weight in projector.parameters()), count_macs(run)


def peak_memory(run: Callable[[], object]) -> int:
    """The bytes that tensors of a run take at most, beside what was there before."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        with memory_trace(trace):
            run()
        return peak_bytes(trace) - before


def best_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The least of several times, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """This machine's multiply-accumulates a second, in a product of large matrices, and bytes a second, in a copy."""
    side = 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=DEVICE) for _ in range(2))
    source = torch.zeros(2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return side**3 / best_seconds(lambda: a @ b), 2 * source.numel() / best_seconds(lambda: target.copy_(source))


def floor_ms(setting: Setting, parameters: int, macs: int, mac_rate: float, byte_rate: float) -> float:
    """The least that a run can take: gradients double the work of forward twice."""
    passes, size = 3 if setting.backward else 1, getattr(torch, setting.dtype).itemsize
    moved = passes * size * (parameters + setting.batch * setting.grid**2 * 1024)
    return 1000 * max(passes * setting.batch * macs / mac_rate, moved / byte_rate)


def measure(setting: Setting, names: list[str], repeats: int) -> list[dict[str, Any]]:
    """A row of numbers for every projector in a setting."""
    speed = rates(getattr(torch, setting.dtype))
    runs = {name: make_run(name, setting)[1] for name in names}
    rows = []
    for name, spent in interleaved(runs, repeats).items():
        parameters, macs = cost(name, setting)
        sizes = {"parameters": parameters, "macs": macs, "peak_bytes": peak_memory(runs[name])}
        rows.append({"projector": name, "ms": spent, "floor_ms": floor_ms(setting, parameters, macs, *speed), **sizes})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    base = statistics.median(next((row for row in rows if row["projector"] == "resampler"), rows[0])["ms"])
    lines = [
        "| projector | parameters (M) | GMAC | median ms | spread | x resampler | share of the floor | peak (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median = statistics.median(row["ms"])
        lines.append(
            f"| {row['projector']} | {row['parameters'] / 1e6:.2f} | {row['macs'] / 1e9:.2f} | {median:.1f} | "
            f"{min(row['ms']):.1f} to {max(row['ms']):.1f} | {median / base:.2f} | {row['floor_ms'] / median:.0%} | "
            f"{row['peak_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Median milliseconds of every projector, a bar chart a setting."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(1.5 + 4.5 * len(results), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, result in zip(axes[0], results, strict=True):
        names = [row["projector"] for row in result["rows"]]
        colours = ["tab:blue" if "resampler" in name and "qwen" not in name else "tab:grey" for name in names]
        bars = axis.barh(names, [statistics.median(row["ms"]) for row in result["rows"]], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.set(xscale="log", xlabel="milliseconds", title=str(Setting(**result["setting"])).replace(", ", "\n", 1))
        axis.title.set_fontsize(8)
    axes[0][0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projectors", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME")
    parser.add_argument("--grid", type=int, nargs="+", default=[GRID], help="patches a side")
    parser.add_argument("--tokens", type=int, nargs="+", default=[TOKENS], help="visual tokens, a square number")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--backward", action="store_true", help="with the gradients of all parameters")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measures, prints and keeps."""
    asked, results = arguments(), []
    print(machine())
    for grid, tokens, batch, dtype in product(asked.grid, asked.tokens, asked.batch, asked.dtype):
        setting = Setting(grid, tokens, batch, dtype, asked.backward)
        rows = measure(setting, asked.projectors, asked.repeats)
        print(f"\n{setting}\n\n{table(rows)}", flush=True)
        results.append({"setting": asdict(setting), "machine": machine(), "rows": rows})
        if asked.json:
            write_whole(asked.json, json.dumps(results, indent=1))
    if asked.plot:
        draw(results, asked.plot)


if __name__ == "__main__":
    main()
