"""Pictures in tiles: which of the model's views are a picture's, what they show together, and how a part is covered."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Grid = tuple[int, int]
ONE, NONE = (1, 1), (0, 0)


@dataclass(frozen=True)
class Cut:
    """How a picture is cut: rows and columns of tiles, of the patches of each tile, of all that are not padding, and of
    the overview's tokens; and the place of its views, the overview first if there is one.
    """

    tiles: Grid
    tile_patches: Grid
    patches: Grid
    overview: Grid
    views: slice

    @property
    def padding(self) -> Grid:
        """Rows of patches above the picture, and columns left of it."""
        across = zip(self.tiles, self.tile_patches, self.patches, strict=True)
        top, left = ((tiles * each - inside) // 2 for tiles, each, inside in across)
        return top, left


def cuts_of(tilings: torch.Tensor, tile_patches: Grid) -> list[Cut]:
    """Of several pictures, from the processor's tilings (B, 3, 2)."""
    cuts, begin = [], 0
    for tiles, patches, overview in ([tuple(grid) for grid in tiling] for tiling in tilings.tolist()):
        end = begin + tiles[0] * tiles[1] + (overview != NONE)
        cuts.append(Cut(tiles, tile_patches, patches, overview, slice(begin, end)))
        begin = end
    return cuts


def whole(views: torch.Tensor, cut: Cut, side: int) -> torch.Tensor:
    """The pixels (3, height, width) of a picture's patches, `side` pixels each, from its views (V, 3, tall, wide)."""
    (rows, columns), (tall, wide) = cut.tiles, cut.tile_patches
    tiles = views[-rows * columns :, :, : tall * side, : wide * side]  # what is beyond has no patch
    pixels = tiles.unflatten(0, cut.tiles).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    (top, left), (height, width) = cut.padding, cut.patches
    return pixels[:, top * side : (top + height) * side, left * side : (left + width) * side]


def cover_views(views: torch.Tensor, patches: tuple[int, ...], cut: Cut, side: int) -> torch.Tensor:
    """A picture's views (V, 3, tall, wide) with some of its patches in its mean colour, in the overview, too."""
    (rows, columns), (tall, wide), (top, left), (height, width) = cut.tiles, cut.tile_patches, cut.padding, cut.patches
    covered_HW = torch.zeros(height * width)
    covered_HW[list(patches)] = 1
    covered_HW = covered_HW.unflatten(0, (height, width))
    around = (left, columns * wide - width - left, top, rows * tall - height - top)
    by_tile = F.pad(covered_HW, around).unflatten(0, (rows, tall)).unflatten(2, (columns, wide)).transpose(1, 2)
    masks = by_tile.flatten(0, 1).repeat_interleave(side, 1).repeat_interleave(side, 2)
    masks = F.pad(masks, (0, views.shape[3] - wide * side, 0, views.shape[2] - tall * side))
    if cut.overview != NONE:
        masks = torch.cat([F.interpolate(covered_HW[None, None], size=views.shape[-2:])[0], masks])
    mean = whole(views, cut, side).mean(dim=(1, 2))[:, None, None]
    return torch.where(masks[:, None].bool().to(views.device), mean, views)


def over_picture(attention: Any, tile_patches: Grid, patches: Grid) -> torch.Tensor:
    """The overview's attention (heads, M, P) on the patches of the whole picture (heads, M, N).

    As in the model, the mean over heads sums to one.
    """
    spread = F.adaptive_avg_pool2d(torch.as_tensor(attention).unflatten(-1, tile_patches), patches).flatten(-2)
    return spread / spread.mean(0).sum(-1, keepdim=True)
