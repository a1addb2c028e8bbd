"""Time and memory of reading a picture in 1 to 36 tiles: CLIP-L/14-336's shapes and the default projector.

    python -m research.benchmarks.tiles
    python -m research.benchmarks.tiles --tower base    CLIP-B/16-224's shapes
    python -m research.benchmarks.tiles --grids 1x1 2x2 3x3 --tokens 576 --repeats 5

Weights are random: times do not depend on them. On a GPU, if there is one, in bfloat16, elsewhere in float32. Prints a
markdown table: milliseconds of tower and projector together and of the projector alone, medians of interleaved repeats,
and the most that tensors took beside the weights and pixels, with the tower run a few views at a time, as it is, and on
all views at once.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig

from ms_resampler import MSResamplerConfig, MSResamplerModel, modeling_ms_resampler
from ms_resampler.tiles_ms_resampler import NONE, Tiling, lay_out
from ms_resampler.training.step_time import peak_memory
from ms_resampler_cli.arguments import count_or_grid

from ..timing import interleaved, machine, markdown_table, spread
from .model import DEVICE, DTYPE, TOWER, shapes

GRIDS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6))
OVERVIEW_SHARE = 0.25
BASE = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TOWERS = {"large": TOWER, "base": BASE | {"num_hidden_layers": 12}}


def make_model(tower: dict[str, Any]) -> MSResamplerModel:
    """The model with a language model of Vicuna's width that is not run."""
    text = LlamaConfig(hidden_size=4096, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return MSResamplerModel(MSResamplerConfig(**shapes(tower, text))).to(getattr(torch, DTYPE)).eval()


def make_inputs(model: MSResamplerModel, grid: tuple[int, int], tokens: int) -> dict[str, Any]:
    """What the model reads of a picture that fills a grid of tiles."""
    tile, patches = model.config.tower.image_size, model.config.native_patch_grid
    size = grid[0] * tile[0], grid[1] * tile[1]
    tiling, laid = lay_out(size, tile, patches, [grid], tokens, (1, 1), OVERVIEW_SHARE)
    pixels = torch.randn(tiling.views, 3, *tile, dtype=model.dtype, device=model.device)
    return {"pixel_values": pixels, "tilings": [tiling], "token_grids": [laid]}


def make_runs(model: MSResamplerModel, inputs: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Tower and projector on a picture, and the projector alone."""
    (tiling,), (grid,) = inputs["tilings"], inputs["token_grids"]
    rows, columns = model.config.native_patch_grid
    x_VNC = torch.randn(
        tiling.views, rows * columns, model.config.feature_width, dtype=model.dtype, device=model.device
    )
    project = partial(model._project_tiles, x_VNC, (rows, columns), [tiling], [grid], False, None)
    return {"both": partial(model.get_image_features, **inputs, return_dict=True), "projector": project}


@torch.inference_mode()
def measure(
    model: MSResamplerModel, grids: list[tuple[int, int]], tokens: int, repeats: int
) -> dict[tuple[int, int], tuple[Tiling, dict[str, list[float]], int, int]]:
    """By grid: how the picture is cut, milliseconds of both runs, and peak bytes with and without a limit of views."""
    inputs = {grid: make_inputs(model, grid, tokens) for grid in grids}
    runs = {grid: make_runs(model, inputs[grid]) for grid in grids}
    flat = {(grid, name): run for grid in grids for name, run in runs[grid].items()}
    times: Any = interleaved(flat, repeats)  # type: ignore[arg-type]
    found = {}
    for grid in grids:
        limited = peak_memory(runs[grid]["both"])
        with patch.object(modeling_ms_resampler, "VIEWS_AT_ONCE", 10**6):
            unlimited = peak_memory(runs[grid]["both"])
        spent = {name: times[grid, name] for name in runs[grid]}
        found[grid] = inputs[grid]["tilings"][0], spent, limited, unlimited
    return found


def table(found: dict[tuple[int, int], tuple[Tiling, dict[str, list[float]], int, int]]) -> str:
    """The measurements in Markdown."""
    head = ["tiles", "views", "patches", "overview tokens", "tower and projector, ms", "spread", "ms a view"]
    rows = []
    for (tall, wide), (tiling, spent, limited, unlimited) in found.items():
        both, alone = (statistics.median(spent[name]) for name in ("both", "projector"))
        seen = 0 if tiling.overview == NONE else tiling.overview[0] * tiling.overview[1]
        cells = [f"{tall} x {wide}", f"{tiling.views}", f"{tiling.patches[0] * tiling.patches[1]:,}", f"{seen}"]
        cells += [f"{both:.0f}", spread(spent["both"]), f"{both / tiling.views:.0f}", f"{alone:.1f}"]
        rows.append([*cells, f"{limited / 1e6:.0f}", f"{unlimited / 1e6:.0f}"])
    return markdown_table([*head, "projector, ms", "memory, MB", "all views at once, MB"], rows)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="large")
    parser.add_argument("--grids", type=count_or_grid, nargs="+", default=list(GRIDS), metavar="RxC")
    parser.add_argument("--tokens", type=int, default=144, help="visual tokens of the picture")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    print(f"{machine()}; {DTYPE}, tower {asked.tower}, {asked.tokens} visual tokens", flush=True)
    print(table(measure(make_model(TOWERS[asked.tower]), asked.grids, asked.tokens, asked.repeats)))


if __name__ == "__main__":
    main()
