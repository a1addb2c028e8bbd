"""Where patches and tokens are: the space in which scopes are laid out, even or moved to the information.

With moving scopes, space is wide where there is much to tell, so that every token's cell holds as much of it:

    m     = 3 x 3 mean of sigmoid(8 w . u)                 how much there is to tell at each patch
    rho   = e / N + (1 - e) m / sum of m                   with a floor, so that no patch vanishes; e = 0.05
    F_y   = cumulative sum of rho over rows                [0, 1] onto itself
    F_x   = cumulative sum of rho along each row           of the rows within half a pitch of it; relative to its sum

A patch's place is (F_y, F_x), and the even grid of tokens is laid over these places: cells, anchors, cell means and
priors are there. w starts at zero, and space even. Tokens keep their raster order and their exact number.

Shapes are named as in resampler_ms_resampler.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
GLOBAL = 1e30  # sigma of the global scope: its prior is zero, and unlike infinity it can be subtracted from itself
CODE, FINEST = 32, 4  # a place's code: its width, and the octaves from its longest wavelength to its shortest


@dataclass
class ScopeMaps:
    """Each token's fusion weights over the scopes, which sum to one, each scope's mean attention over its heads, and
    the mean place (y, x) in [0, 1]^2 of each token's cell.
    """

    weights_BSM: Tensor
    attentions_BSMN: Tensor
    places_BM2: Tensor


class LinearFromZero(nn.Linear):
    """A linear layer whose weight is initialised to zero."""


def check_patches(x_BNC: Tensor, patch_grid: Grid) -> None:
    """Raises ValueError unless there is one feature for each patch of the grid."""
    if x_BNC.shape[1] != patch_grid[0] * patch_grid[1]:
        raise ValueError(
            f"Got {x_BNC.shape[1]} patch features for a grid of {patch_grid[0]} x {patch_grid[1]} patches: "
            "the vision tower's prefix tokens or the image size do not fit the configuration."
        )


def mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear, activation, Linear; the hidden width is the output width."""
    return nn.Sequential(nn.Linear(inputs, outputs), activation(), nn.Linear(outputs, outputs))


def spread(sigma: float | None, heads: int) -> tuple[Tensor, Tensor]:
    """The initial sigmas (h,) and offsets (h, 2) of a scope's heads; None is the global scope.

    Several heads start at half the scope's sigma, at points of a sunflower spiral over a disc of radius sigma.
    """
    if sigma is None or heads == 1:
        return torch.full((heads,), float(sigma or GLOBAL)), torch.zeros(heads, 2)
    number = torch.arange(heads) + 0.5
    radius, angle = (number / heads).sqrt(), number * math.pi * (3 - math.sqrt(5))
    points_h2 = torch.stack([radius * angle.sin(), radius * angle.cos()], dim=-1)
    return torch.full((heads,), sigma / 2), sigma * (points_h2 - points_h2.mean(dim=0))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of places and maps: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def centres(cells: int, like: Tensor) -> Tensor:
    """Centres of equal cells of the unit interval, on the device of `like`, in float32 or wider."""
    return (torch.arange(cells, device=like.device, dtype=wide(like.dtype)) + 0.5) / cells


def cell_centres(grid: Grid, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres (y, x) of the cells of a grid over the unit square, in raster order: (rows * columns, 2)."""
    return torch.cartesian_prod(*((torch.arange(n, device=device, dtype=dtype) + 0.5) / n for n in grid))


def sincos_positions(points: Tensor, width: int, finest: int = 6) -> Tensor:
    """Unit-scale 2-D sin-cos codes (..., width) of points (y, x) in [0, 1]^2.

    Wavelengths form a geometric series from two images to 2^-finest of that, and so do not depend on the grid.
    """
    octaves = torch.linspace(0, finest, width // 4, device=points.device, dtype=points.dtype)
    angles = points[..., None] * (math.pi * 2**octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2) * math.sqrt(2)


def as_map(x_BNC: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) -> (B, C, H, W), channels last, without a copy."""
    return x_BNC.unflatten(1, grid).permute(0, 3, 1, 2)  # the other order hides one image's layout from kernels


def as_tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return x_BCHW.flatten(2).mT


def cell_means(x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
    """The mean of the patches in each token's cell (B, M, C); cells overlap if the grids do not divide evenly."""
    return as_tokens(F.adaptive_avg_pool2d(as_map(x_BNC, patch_grid), token_grid))


@dataclass
class EvenPlaces:
    """Places of patches in even space, the same in every image: y (1, H) and x (1, 1, W).

    Places are in anchor pitches from the image's centre, which keeps them small.
    """

    y_BH: Tensor
    x_BHW: Tensor
    patch_grid: Grid
    token_grid: Grid

    @classmethod
    def of(cls, patch_grid: Grid, token_grid: Grid, like: Tensor) -> "EvenPlaces":
        """The places of a grid of patches under a grid of tokens."""
        y_H, x_W = (
            (centres(patches, like) - 0.5) * tokens for patches, tokens in zip(patch_grid, token_grid, strict=True)
        )
        return cls(y_H[None], x_W[None, None], patch_grid, token_grid)

    def cell_means(self, x_BNC: Tensor) -> Tensor:
        """The mean of the patches in each token's cell (B, M, C)."""
        return cell_means(x_BNC, self.patch_grid, self.token_grid)

    def of_tokens(self, images: int) -> Tensor:
        """The mean place (y, x) in [0, 1]^2 of each token's cell (B, M, 2)."""
        points_N2 = cell_centres(self.patch_grid, self.y_BH.device, self.y_BH.dtype)
        return self.cell_means(points_N2.expand(images, -1, -1))


@dataclass
class MovedPlaces(EvenPlaces):
    """Places of patches in moved space, y (B, H) and x (B, H, W), and the share that each has in each cell.

    The shares of a cell sum to one: rows (B, Y, H), and in each row columns (B, H, X, W).
    """

    rows_BYH: Tensor
    columns_BHXW: Tensor

    def cell_means(self, x_BNC: Tensor) -> Tensor:
        """The mean of the patches in each token's cell (B, M, C), weighted by their shares."""
        x_BHWC = x_BNC.unflatten(1, self.patch_grid)
        means_BHXC = self.columns_BHXW.to(x_BNC.dtype) @ x_BHWC
        return (self.rows_BYH.to(x_BNC.dtype) @ means_BHXC.flatten(2)).unflatten(2, means_BHXC.shape[2:]).flatten(1, 2)

    def of_tokens(self, images: int) -> Tensor:
        """The mean place (y, x) in [0, 1]^2 of each token's cell (B, M, 2)."""
        y_H, x_W = (centres(patches, self.y_BH) for patches in self.patch_grid)
        y_BY = (self.rows_BYH * y_H).sum(-1)
        x_BYX = (self.rows_BYH[..., None] * (self.columns_BHXW * x_W).sum(-1)[:, None]).sum(2)
        return torch.stack([y_BY[..., None].expand_as(x_BYX), x_BYX], dim=-1).flatten(1, 2)


class MovingSpace(nn.Module):
    """Moves space to the information, by the equations at the top of this file, and tells tokens where they look."""

    gain, floor = 8.0, 0.05

    def __init__(self, width: int):
        super().__init__()
        self.density = LinearFromZero(width, 1, bias=False)
        self.code_proj = LinearFromZero(CODE, width, bias=False)

    def forward(self, u_BND: Tensor, patch_grid: Grid, token_grid: Grid) -> tuple[MovedPlaces, Tensor]:
        """The places of patches, and a code of each token's mean place (B, M, D)."""
        rho_BHW = self.how_much(u_BND, patch_grid)
        edge_BH = cumulated(rho_BHW.sum(-1))
        y_BH = middles(edge_BH)
        away_BHH = (y_BH[:, :, None] - y_BH[:, None]) * token_grid[0]
        # Not a matrix product: autocast would round it.
        near_BHW = (torch.exp(-2 * away_BHH.square())[..., None] * rho_BHW[:, None]).sum(2)
        edge_BHW = cumulated(near_BHW / near_BHW.sum(-1, keepdim=True))
        places = MovedPlaces(
            y_BH=(y_BH - 0.5) * token_grid[0],
            x_BHW=(middles(edge_BHW) - 0.5) * token_grid[1],
            patch_grid=patch_grid,
            token_grid=token_grid,
            rows_BYH=shares(edge_BH, token_grid[0]),
            columns_BHXW=shares(edge_BHW, token_grid[1]),
        )
        code_BMc = sincos_positions(places.of_tokens(len(u_BND)), CODE, FINEST)
        return places, self.code_proj(code_BMc.to(u_BND.dtype))

    def how_much(self, u_BND: Tensor, patch_grid: Grid) -> Tensor:
        """rho (B, H, W): how much there is to tell at each patch; it sums to one."""
        m_B1HW = as_map((self.gain * self.density(u_BND).to(wide(u_BND.dtype))).sigmoid(), patch_grid)
        m_BHW = F.avg_pool2d(m_B1HW, 3, 1, 1, count_include_pad=False).squeeze(1)
        return self.floor / u_BND.shape[1] + (1 - self.floor) * m_BHW / m_BHW.sum((1, 2), keepdim=True)


def cumulated(x: Tensor) -> Tensor:
    """The cumulative sum along the last dimension, with the zero before it: the edges of spans."""
    return F.pad(x.cumsum(-1), (1, 0))


def middles(edges: Tensor) -> Tensor:
    """The middle of each span between edges."""
    return (edges[..., 1:] + edges[..., :-1]) / 2


def shares(edges: Tensor, cells: int) -> Tensor:
    """How much of each of equal cells of [0, 1] each span between edges (..., P + 1) has: (..., cells, P)."""
    low = torch.arange(cells, device=edges.device, dtype=edges.dtype)[:, None] / cells
    begin, end = edges[..., None, :-1], edges[..., None, 1:]
    share = (torch.minimum(end, low + 1 / cells) - torch.maximum(begin, low)).clamp(min=0)
    return share / share.sum(-1, keepdim=True)  # exactly one, whatever the rounding of the edges


__all__ = ["EvenPlaces", "MovedPlaces", "MovingSpace", "ScopeMaps"]
