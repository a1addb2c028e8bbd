"""Large pictures in tiles: cut at their own proportions into views of the tower's size, whose patches form one grid.

    picture -> resized into rows x columns of tiles, padded -> tiles -> tower -> one grid of patches, without padding
            -> squeezed into a single view, the overview -------------> tower -> a grid of its own

The projector lays its token grid over the grid of the whole picture, so that cells and scopes cross the borders of
tiles. Tokens of the overview come first. A picture of one tile has no overview.

Shapes are named as in resampler_ms_resampler.py; V views are all overviews and tiles, P the patches of the overview.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from .configuration_ms_resampler import is_grid, nearest_grid, token_grid

Grid = tuple[int, int]
MOST_TILES = 36
PATCHES_A_TOKEN = 4  # of the budget "auto": 144 tokens for 576 patches
OPTIONS_EACH = 8  # numbers of tokens, nearest to its share, that are tried for each of several pictures
SUMS = 200  # of their numbers so far, nearest to what is due, that are kept
NONE = (0, 0)  # the token grid of an overview that is not there


class Tiling(NamedTuple):
    """How a picture is cut: rows and columns of tiles, of the patches that are not padding, and of overview tokens."""

    tiles: Grid
    patches: Grid
    overview: Grid

    @property
    def views(self) -> int:
        """The number of images that the tower reads: the tiles and, if there is one, the overview."""
        return self.tiles[0] * self.tiles[1] + (self.overview != NONE)


def read_tilings(tilings: Tensor | Sequence) -> list[Tiling]:
    """Tilings from a tensor (B, 3, 2) or from nested sequences."""
    rows = tilings.tolist() if isinstance(tilings, Tensor) else tilings
    return [Tiling(*((int(rows), int(columns)) for rows, columns in row)) for row in rows]


def grids_of(tiles: Any) -> list[Grid]:
    """The tile grids that a setting allows: up to a count, a grid, or a list of grids. Raises ValueError for others."""
    if isinstance(tiles, int) and not isinstance(tiles, bool) and 1 <= tiles <= MOST_TILES:
        grids = [(rows, columns) for rows in range(1, tiles + 1) for columns in range(1, tiles // rows + 1)]
        return sorted(grids, key=lambda grid: (grid[0] * grid[1], grid))
    grids = [tiles] if is_grid(tiles) else tiles
    listed = isinstance(grids, (list, tuple)) and bool(grids) and all(map(is_grid, grids))
    if listed and all(rows * columns <= MOST_TILES for rows, columns in grids):
        return [(rows, columns) for rows, columns in grids]
    raise ValueError(
        f"`tiles` is a count from 1 to {MOST_TILES}, which means up to that many, a grid (rows, columns), or a list of "
        f"such grids to choose from, each of at most {MOST_TILES} tiles; got {tiles!r}."
    )


def picture_patches(image_size: Grid, whole: Grid) -> Grid:
    """The patches (H, W) that a picture of (height, width) pixels has in the middle of a grid of patches.

    LLaVA-NeXT's rule: as many patches are left out above as below, or left as right, each at least half of it padding.
    """
    (height, width), (rows, columns) = image_size, whole
    if width / height > columns / rows:
        inside = max(1, int(round(height * columns / width, 7)))
        return rows - 2 * ((rows - inside) // 2), columns
    inside = max(1, int(round(width * rows / height, 7)))
    return rows, columns - 2 * ((columns - inside) // 2)


def split_budget(budget: Any, share: float, overview: Grid, patches: Grid) -> tuple[Grid, Grid] | None:
    """The token grids of overview and picture, over their patches, which together have exactly the budget.

    Of a count, the overview has the number nearest to its share with which both have a grid of about their patches'
    proportions or, if there is none, any grid. A grid lies over the picture, and leaves no overview; None is one token
    a patch, of both. Returns None if there are too few patches.
    """
    if budget is None:
        return (overview if share else NONE), patches
    if is_grid(budget):
        rows, columns = budget
        return (NONE, (rows, columns)) if rows * columns <= patches[0] * patches[1] else None
    if not isinstance(budget, int) or isinstance(budget, bool):
        return None
    most = min(budget - 1, overview[0] * overview[1] if share else 0)
    possible = range(max(0, budget - patches[0] * patches[1]), most + 1)
    for off in (2, math.inf):
        for count in sorted(possible, key=lambda n: (abs(n - share * budget), n)):
            seen = nearest_grid(count, overview, off) if count else NONE
            laid = nearest_grid(budget - count, patches, off)
            if seen and laid:
                return seen, laid
    return None


def budgets_for(budget: Any, bounds: Grid, patches: Grid) -> Iterator[Any]:
    """The budget; for "auto" all counts between the bounds, beginning with that nearest to a quarter of the patches."""
    if budget != "auto":
        yield budget
        return
    least, most = bounds
    wanted = patches[0] * patches[1] / PATCHES_A_TOKEN
    yield from sorted(range(least, most + 1), key=lambda count: (abs(count - wanted), count))


def lay_out(
    image_size: Grid,
    tile_size: Grid,
    tile_patches: Grid,
    grids: list[Grid],
    budget: Any,
    bounds: Grid,
    share: float,
    share_of_one: float = 0.0,
) -> tuple[Tiling, Grid]:
    """The tiling of a picture of (height, width) pixels, and its token grid; with one tile, another share counts.

    Of the grids on which the budget has room, the one that keeps most of the picture's pixels is taken, and of several
    such the one with the least padding. Raises ValueError if the budget has room on none.
    """
    open_grids = {(rows * tile_size[0], columns * tile_size[1]): (rows, columns) for rows, columns in grids}
    patches = tile_patches
    while open_grids:
        rows, columns = open_grids.pop(select_best_resolution(image_size, list(open_grids)))
        patches = picture_patches(image_size, (rows * tile_patches[0], columns * tile_patches[1]))
        for count in budgets_for(budget, bounds, patches):
            of_overview = share if rows * columns > 1 else share_of_one
            if parts := split_budget(count, of_overview, tile_patches, patches):
                return Tiling((rows, columns), patches, parts[0]), parts[1]
    if budget == "auto":
        raise ValueError(
            f"No number of visual tokens from {bounds[0]} to {bounds[1]} can be laid out over {patches[0]} x "
            f"{patches[1]} patches: widen `auto_tokens`."
        )
    token_grid(budget, patches)
    raise AssertionError("token_grid names the reason")


def share_out(
    total: int,
    weights: Sequence[float],
    can_have: Callable[[int, int], bool],
    name: str = "visual_tokens_total",
    whose: str = "images",
) -> list[int]:
    """Visual tokens of several pictures, which add up to the total, each as near to its weighted share as possible.

    can_have(picture, count): whether a picture can have that many. Raises ValueError if there are no such numbers.
    """
    if total < len(weights):
        raise ValueError(f"`{name}` {total} is too small: the {len(weights)} {whose} need one token each.")
    reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    due = 0.0
    for picture, weight in enumerate(weights):
        wanted = total * weight / sum(weights)
        due += wanted
        near = sorted(range(1, total + 1), key=lambda count: (abs(count - wanted), count))
        counts = list(islice((count for count in near if can_have(picture, count)), OPTIONS_EACH))
        ways: dict[int, tuple[float, tuple[int, ...]]] = {}
        for before, (cost, taken) in reached.items():
            for count in counts:
                way = cost + abs(count - wanted), (*taken, count)
                ways[before + count] = min(ways.get(before + count, way), way)
        reached = {tokens: ways[tokens] for tokens in sorted(ways, key=lambda tokens: abs(tokens - due))[:SUMS]}
    if total not in reached:
        near = sorted(sorted(reached, key=lambda count: abs(count - total))[:3])
        hint = f"; use a total such as {', '.join(map(str, near))}" if near else ""
        raise ValueError(f"`{name}` {total} cannot be shared exactly among {len(weights)} {whose}{hint}.")
    return list(reached[total][1])


def cut(picture: Image.Image, tiling: Tiling, tile_size: Grid, resample: Any) -> list[Image.Image]:
    """A picture's views of (height, width) pixels: the overview, if there is one, and the tiles in raster order."""
    (tall, wide), (rows, columns) = tile_size, tiling.tiles
    whole = rows * tall, columns * wide
    blank = np.empty((picture.height, picture.width, 0))  # only its shape is read
    height, width = get_patch_output_size(blank, whole, ChannelDimension.LAST)
    canvas = Image.new("RGB", whole[::-1])
    canvas.paste(picture.resize((width, height), resample), ((whole[1] - width) // 2, (whole[0] - height) // 2))
    corners = [(column * wide, row * tall) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((left, top, left + wide, top + tall)) for left, top in corners]
    return tiles if tiling.overview == NONE else [picture.resize((wide, tall), resample), *tiles]


def join_tiles(x_VNC: Tensor, tile_patches: Grid, tiling: Tiling) -> Tensor:
    """The patches (N, C) of a whole picture, from those of its tiles, without padding."""
    x_rchwC = x_VNC.unflatten(1, tile_patches).unflatten(0, tiling.tiles)
    x_HWC = x_rchwC.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    height, width = tiling.patches
    top, left = (x_HWC.shape[0] - height) // 2, (x_HWC.shape[1] - width) // 2
    return x_HWC[top : top + height, left : left + width].flatten(0, 1)


def over_picture(attention_SMP: Tensor, tile_patches: Grid, patches: Grid) -> Tensor:
    """The overview's attention on the patches of the whole picture (S, M, N); it sums to one again."""
    map_SMHW = F.adaptive_avg_pool2d(attention_SMP.unflatten(-1, tile_patches), patches)
    attention_SMN = map_SMHW.flatten(-2)
    return attention_SMN / attention_SMN.sum(-1, keepdim=True)


__all__ = ["Tiling", "cut", "grids_of", "join_tiles", "lay_out", "over_picture", "read_tilings", "share_out"]
