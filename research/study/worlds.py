"""Worlds: how a scene's information is spread over the picture. The questions and the answers stay the same.

    even              the scene as it is drawn: 3 x 3 places fill the picture
    on the places     the scene on a blank page of 16 x 16 patches, from its corner
    across them       the same, two patches from its corner
    quarter           the scene at half the size, anywhere on a blank page
    quarter, textured the same on a page whose every patch is of another scene's paper
    lines             the rows of places apart, each with a margin of its own
    clusters          rows, and the places along each row, denser towards one side

In the last four, a picture has 12 x 12 patches of twice the side: features of 2 x 2 of the scene's patches, reduced to
the tower's channels by their principal components. A place has 2 x 2 such patches. Shapes are named as in
resampler_ms_resampler.py.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ms_resampler.folders import whole_file
from ms_resampler.places_ms_resampler import Grid, cell_centres

from .data import CHANNELS, GRID, SPLITS, Split, StudyData, place_codes

EVEN = "even"
MARGINS = {"on the places": 0, "across them": 2}  # blank patches above and to the left
UNEVEN = ("quarter", "quarter, textured", "lines", "clusters")
LARGE_GRID = (16, 16)  # patches of a picture with margins
PLACES, BLOCKS = 3, 6  # a side of a scene has three places, and six blocks of 2 x 2 patches
BLANK = GRID[0] - BLOCKS  # blank rows of a page, and blank columns of each row
MERGING = "merging.safetensors"
MEASURED, PAPERS = 1_500, 4_096  # scenes whose principal components are taken; patches of paper that are kept


def grid_of(world: str) -> Grid:
    """The patches of a picture of a world."""
    return LARGE_GRID if world in MARGINS else GRID


def in_world(data: StudyData, world: str, position_scale: float) -> StudyData:
    """The data with its scenes in a world."""
    if world == EVEN:
        return data
    if world in MARGINS:
        splits = {name: amid_paper(split, MARGINS[world], position_scale) for name, split in data.splits.items()}
    else:
        splits = {name: on_page(data, name, world, position_scale) for name in data.splits}
    return dataclasses.replace(data, splits=splits)


# --- Scenes amid paper ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AmidPaper:
    """Features (B, N, C) of scenes on 16 x 16 patches, made when asked for: a scene, `margin` patches from the top and
    from the left, and the mean of its paper around it, with the codes of places of the larger picture.
    """

    features_BNC: np.ndarray
    labels_BN2: Tensor
    margin: int
    position_scale: float

    def __getitem__(self, pictures: np.ndarray | slice) -> np.ndarray:
        x_BNC = self.features_BNC[pictures].astype(np.float32) - place_codes(GRID, self.position_scale)
        paper_BN1 = (self.labels_BN2[pictures][..., :1] == 0).numpy()
        mean_B1C = (x_BNC * paper_BN1).sum(1, keepdims=True) / paper_BN1.sum(1, keepdims=True)
        return on_paper(x_BNC, self.margin, mean_B1C) + place_codes(LARGE_GRID, self.position_scale)


def on_paper(x_BNC: np.ndarray, margin: int, paper_B1C: np.ndarray | int) -> np.ndarray:
    """A scene's patches placed among those of the blank page."""
    (rows, columns), pictures, channels = GRID, len(x_BNC), x_BNC.shape[-1]
    large = np.empty((pictures, LARGE_GRID[0] * LARGE_GRID[1], channels), x_BNC.dtype)
    large[:] = paper_B1C
    large_BHWC = large.reshape(pictures, *LARGE_GRID, channels)
    large_BHWC[:, margin : margin + rows, margin : margin + columns] = x_BNC.reshape(-1, rows, columns, channels)
    return large


def amid_paper(split: Split, margin: int, position_scale: float) -> Split:
    """The scenes of a split on a blank page, with the same questions."""
    assert isinstance(split.features_BNC, np.ndarray)
    labels_BN2 = torch.from_numpy(on_paper(split.labels_BN2.numpy(), margin, 0))
    features = AmidPaper(split.features_BNC, split.labels_BN2, margin, position_scale)
    points_1N2 = cell_centres(LARGE_GRID)[None]
    return dataclasses.replace(split, features_BNC=features, labels_BN2=labels_BN2, points_BN2=points_1N2)


# --- Scenes whose places lie unevenly over a page ---------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a scene's 6 x 6 blocks lie on the page of 12 x 12 patches: rows (B, 6) and columns (B, 6, 6)."""

    rows_B6: np.ndarray
    columns_B66: np.ndarray

    @cached_property
    def points_BN2(self) -> Tensor:
        """The centres (y, x) on the page of the scene's 12 x 12 original patches: (B, 144, 2)."""
        half = (np.arange(GRID[0]) % 2 + 0.5) / 2  # where a patch lies in its block
        y_BH = (self.rows_B6.repeat(2, 1) + half) / GRID[0]
        x_BHW = (self.columns_B66.repeat(2, 1).repeat(2, 2) + half) / GRID[1]
        points_BHW2 = np.stack(np.broadcast_arrays(y_BH[..., None], x_BHW), axis=-1)
        return torch.from_numpy(points_BHW2.astype(np.float32)).flatten(1, 2)


def layout_of(world: str, split: int, pictures: int) -> Layout:
    """The layouts of a split: how many blank rows precede each row of places, and blank columns each place."""
    kinds = {"quarter": quarter, "lines": lines, "clusters": clusters}
    kind = world.split(",")[0]
    down_B3, along_B33 = kinds[kind](pictures, np.random.default_rng((split, list(kinds).index(kind))))
    rows_B6 = np.arange(BLOCKS) + down_B3.repeat(2, 1)
    return Layout(rows_B6, np.arange(BLOCKS) + along_B33.repeat(2, 1).repeat(2, 2))


def quarter(pictures: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """All blank rows and columns are outside."""
    down, along = rng.integers(0, BLANK + 1, (2, pictures))
    return down[:, None].repeat(PLACES, 1), along[:, None, None].repeat(PLACES, 1).repeat(PLACES, 2)


def lines(pictures: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blank rows are anywhere; blank columns are outside, in every row of places elsewhere."""
    down_B3 = np.sort(rng.integers(0, BLANK + 1, (pictures, PLACES)), axis=1)
    return down_B3, rng.integers(0, BLANK + 1, (pictures, PLACES, 1)).repeat(PLACES, 2)


def clusters(pictures: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places at powers of even steps, from 1/4 to 4: crowded at one end, and farther and farther apart."""
    steps = (np.arange(PLACES) + 0.5) / PLACES
    powers = 4 ** rng.uniform(-1, 1, (pictures, 1 + PLACES))
    shift = np.rint(BLANK * steps ** powers[..., None]).astype(int)
    return shift[:, 0], shift[:, 1:]


def covered(points_BN2: Tensor, patch_grid: Grid) -> Tensor:
    """1 for each patch of a picture that points lie in, else 0: (B, H, W)."""
    shown_BHW = torch.zeros(len(points_BN2), *patch_grid, device=points_BN2.device)
    rows_BN, columns_BN = (points_BN2 * points_BN2.new_tensor(patch_grid)).long().unbind(-1)
    shown_BHW[torch.arange(len(points_BN2), device=points_BN2.device)[:, None], rows_BN, columns_BN] = 1
    return shown_BHW


@dataclass(frozen=True)
class OnPage:
    """Features (B, N, C) of scenes on a page, made when asked for, with the codes of the page's places.

    blocks_B66C: the scenes' features; page_BN: which patch of paper_PC each patch of the page is of, or the one of all.
    """

    blocks_B66C: np.ndarray
    layout: Layout
    paper_PC: np.ndarray
    page_BN: np.ndarray
    position_scale: float

    def __getitem__(self, pictures: np.ndarray | slice) -> np.ndarray:
        page_BHWC = self.paper_PC[self.page_BN[pictures]].reshape(-1, *GRID, CHANNELS)
        rows_B61 = self.layout.rows_B6[pictures][..., None]
        each = np.arange(len(page_BHWC))[:, None, None]
        page_BHWC[each, rows_B61, self.layout.columns_B66[pictures]] = self.blocks_B66C[pictures]
        return page_BHWC.reshape(-1, GRID[0] * GRID[1], CHANNELS) + place_codes(GRID, self.position_scale)


def on_page(data: StudyData, name: str, world: str, position_scale: float) -> Split:
    """The scenes of a split on pages, with the same questions; labels are those of the scene's own patches."""
    split, number = data.splits[name], SPLITS.index(name)
    paper_PC = merging(data, position_scale)["paper"]
    layout = layout_of(world, number, len(split.labels_BN2))
    shape = len(split.labels_BN2), GRID[0] * GRID[1]
    if world.endswith("textured"):
        page_BN = np.random.default_rng(number).integers(0, len(paper_PC), shape)
    else:
        page_BN, paper_PC = np.zeros(shape, int), paper_PC.mean(0, keepdims=True)
    features = OnPage(blocks_of(data, name, position_scale), layout, paper_PC, page_BN, position_scale)
    return dataclasses.replace(split, features_BNC=features, points_BN2=layout.points_BN2)


def merging(data: StudyData, position_scale: float) -> dict[str, np.ndarray]:
    """How four patches become one: mean and components of their features, and `paper` (P, C); made on first use."""
    path = data.folder / MERGING
    if not path.exists():
        split = data.splits["train"]
        x_BbF = side_by_side(split.features_BNC[:MEASURED], position_scale)
        blank_Bb = side_by_side(split.labels_BN2[:MEASURED, :, :1].numpy()).max(-1) == 0
        x_XF = x_BbF.reshape(-1, x_BbF.shape[-1])
        mean, (_, vectors) = x_XF.mean(0), np.linalg.eigh(np.cov(x_XF.T))
        vectors = vectors[:, : -CHANNELS - 1 : -1]
        vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(CHANNELS)])  # the same on every machine
        vectors /= ((x_XF - mean) @ vectors).std()
        paper_PC = (x_BbF[blank_Bb] - mean) @ vectors
        chosen = np.linspace(0, len(paper_PC) - 1, min(PAPERS, len(paper_PC))).astype(int)
        made = {"mean": mean, "components": vectors, "paper": paper_PC[chosen]}
        with whole_file(path) as fresh:
            save_file({key: np.ascontiguousarray(value, np.float32) for key, value in made.items()}, fresh)
    return load_file(path)


def side_by_side(x_BNC: np.ndarray, position_scale: float = 0) -> np.ndarray:
    """2 x 2 patches as one, (B, 36, 4 C), without the codes of places."""
    if position_scale:
        x_BNC = x_BNC.astype(np.float32) - place_codes(GRID, position_scale)
    x = x_BNC.reshape(-1, BLOCKS, 2, BLOCKS, 2, x_BNC.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x_BNC), BLOCKS**2, -1)


def blocks_of(data: StudyData, name: str, position_scale: float) -> np.ndarray:
    """Features (B, 6, 6, C) of the blocks of a split's scenes, memory-mapped; made on first use."""
    path = data.folder / f"{name}-blocks.npy"
    if not path.exists():
        how, features_BNC = merging(data, position_scale), data.splits[name].features_BNC
        with whole_file(path) as fresh:
            write_blocks(features_BNC, how, position_scale, fresh)
    return np.load(path, mmap_mode="r")


def write_blocks(features_BNC: np.ndarray, how: dict[str, np.ndarray], position_scale: float, path: Path) -> None:
    """Writes the blocks of all scenes of a split, in half precision."""
    shape = len(features_BNC), BLOCKS, BLOCKS, CHANNELS
    blocks_B66C = open_memmap(path, "w+", np.float16, shape)
    for start in range(0, len(features_BNC), 500):
        part = slice(start, start + 500)
        x_BbF = side_by_side(features_BNC[part], position_scale)
        blocks_B66C[part] = ((x_BbF - how["mean"]) @ how["components"]).reshape(-1, *shape[1:])
    blocks_B66C.flush()
