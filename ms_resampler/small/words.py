"""The words stage: the projector learns to say what is at each place, without the language model being run.

Each visual token is a mixture of words, softmax(y E^T) E. Its shares must be those of the things in the token's cell
by the area that each covers; what none covers is the background.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .features import FINE, Features
from .parts import things, tower_classes

GRIDS, OFTEN = ((6, 6), (4, 4), (3, 3)), (0.6, 0.25, 0.15)  # token grids of the steps, and how often each is used
BACKGROUND_WEIGHT = 0.15  # of the loss: most cells are empty
DROPOUT = 0.15
CLASS_GROUPS = ((3, 1), (10, 2), (40, 4), (1000, 8))  # up to so many classes of a noun are so many groups


class CellsOfScenes(Dataset):
    """Scene numbers in training order, epoch after epoch, with the token grid of their step: of GRIDS, or `grid`."""

    def __init__(
        self, features: Features, length: int, batch_size: int, seed: int = 0, grid: tuple[int, int] | None = None
    ):
        self.features, self.length, self.batch_size, self.seed, self.grid = features, length, batch_size, seed, grid

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, self.features.count)
        number = (place * 7919 + epoch * 4241 + self.seed) % self.features.count  # 7919 is prime: every scene once
        step = random.Random(f"{self.seed} {index // self.batch_size}")
        return {"number": number, "grid": self.grid or step.choices(GRIDS, OFTEN)[0]}


class CellsCollator:
    """Patches and shares of words of a batch of scenes."""

    def __init__(self, features: Features):
        self.features = features
        self.nouns = {noun: number for number, noun in enumerate(things())}

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        grid = records[0]["grid"]
        numbers = [record["number"] for record in records]
        shares = [self.shares(self.features.scenes[number], grid) for number in numbers]
        return {"x_BNC": self.features.patches(numbers), "share_BMW": torch.stack(shares)}

    def shares(self, scene: dict[str, Any], grid: tuple[int, int]) -> Tensor:
        """The share of every word in each cell (M, words): the covered area of each noun, and the background's."""
        share_MW = torch.zeros(grid[0] * grid[1], len(self.nouns) + 1)
        for noun, (left, top, right, bottom) in zip(scene["nouns"], scene["boxes"], strict=True):
            covered = overlap(grid[0], top, bottom)[:, None] * overlap(grid[1], left, right)
            share_MW[:, self.nouns[noun]] += covered.flatten()
        share_MW = share_MW / share_MW.sum(-1, keepdim=True).clamp(min=1)
        share_MW[:, -1] = 1 - share_MW.sum(-1)
        return share_MW


def overlap(cells: int, begin: float, end: float) -> Tensor:
    """Which part of each of equal cells of the unit interval lies between two points."""
    edges = torch.arange(cells + 1) / cells
    return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=begin)).clamp(min=0) * cells


class SayingCells(nn.Module):
    """The projector, and the loss of its words in every cell: cross-entropy, in which the background counts less."""

    table_WT: Tensor
    weight_W: Tensor

    def __init__(self, model: Any):
        super().__init__()
        self.projector, self.scoped = model.model.projector, bool(model.config.projector_config.num_scopes)
        with torch.no_grad():
            table_WT = model.get_input_embeddings()(torch.tensor(model.config.visual_words)).float()
        self.register_buffer("table_WT", table_WT, persistent=False)
        weight_W = torch.ones(len(table_WT))
        weight_W[-1] = BACKGROUND_WEIGHT
        self.register_buffer("weight_W", weight_W, persistent=False)

    def says(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """The logarithm of each word's share in every token (B, M, words)."""
        y = self.projector(x_BNC, FINE[:2], grid)
        return F.linear((y[0] if self.scoped else y).float(), self.table_WT).log_softmax(dim=-1)

    def forward(self, x_BNC: Tensor, share_BMW: Tensor) -> dict[str, Tensor]:
        """The loss; shares are those of CellsCollator, of a square grid."""
        side = round(share_BMW.shape[1] ** 0.5)
        said_BMW = self.says(x_BNC, (side, side))
        return {"loss": -(share_BMW * said_BMW * self.weight_W).sum(-1).mean()}


@torch.no_grad()
def score_names(saying: SayingCells, features: Features, grid: tuple[int, int]) -> dict[str, float]:
    """Which nouns the tokens say, likeliest first: of one thing the first and the first five, in percent of pictures;
    of a scene with n different nouns the first n, in percent of them.
    """
    saying.eval()
    nouns = list(things())
    first, among_five, found, wanted = [], [], 0, 0
    for begin in range(0, features.count, 50):
        numbers = range(begin, min(begin + 50, features.count))
        said_BW = saying.says(features.patches(numbers), grid).exp()[..., : len(nouns)].sum(1)
        for number, order in zip(numbers, said_BW.argsort(dim=-1, descending=True).tolist(), strict=True):
            true = {nouns.index(noun) for noun in features.scenes[number]["nouns"]}
            if len(features.scenes[number]["nouns"]) == 1:
                first.append(order[0] in true)
                among_five.append(bool(true & set(order[:5])))
            elif len(true) > 1:
                found, wanted = found + len(true & set(order[: len(true)])), wanted + len(true)
    parts = (("one thing, first", sum(first), len(first)), ("one thing, first five", sum(among_five), len(first)))
    return {name: round(100 * right / of, 1) for name, right, of in (*parts, ("scene", found, wanted))}


def add_dropout(projector: Any) -> list[Any]:
    """Dropout in training, before and after the projector's layers; returns the handles that remove it."""
    layers = [projector.input_proj, projector.output_norm]

    def dropped(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, module.training)

    return [layer.register_forward_hook(dropped) for layer in layers]


@torch.no_grad()
def say_the_towers_classes(projector: Any, table_WT: Tensor) -> None:
    """Starts the pooled MLP of a projector from the tower's own classifier, so that it names photographs untrained.

    A hidden unit is a group of classes of one noun, and adds to y a direction that only the noun's word sees: a column
    of the pseudo-inverse of the table of words. The MLP stays frozen, because training on drawings would unlearn it.
    """
    weight_KC, bias_K = tower_classes()
    direction_TW = torch.linalg.pinv(table_WT)
    first, last = projector.mlp[0], projector.mlp[2]
    last.weight *= 0.02
    first.weight *= 0.1
    unit = 0
    for word, known in enumerate(things().values()):
        classes = known.get("classes", [])
        for group in groups_of(weight_KC[classes]) if classes else []:
            chosen = [classes[number] for number in group]
            first.weight[unit] = 0
            first.weight[unit, : weight_KC.shape[1]] = weight_KC[chosen].mean(0)
            first.bias[unit] = bias_K[chosen].mean() - 3  # GELU passes classes that are likely
            last.weight[:, unit] = direction_TW[:, word]
            unit += 1
    assert unit <= len(first.bias), "more groups of classes than hidden units"
    projector.mlp.requires_grad_(False)


def groups_of(weight_KC: Tensor) -> list[list[int]]:
    """Classes in groups of similar weights (k-means), more for nouns of many classes, such as 118 breeds of dogs."""
    count = next(groups for most, groups in CLASS_GROUPS if len(weight_KC) < most)
    centre_GC = weight_KC[torch.linspace(0, len(weight_KC) - 1, count).long()]
    for _ in range(10):
        nearest_K = torch.cdist(weight_KC, centre_GC).argmin(1)
        members = [(nearest_K == group).nonzero().flatten().tolist() for group in range(count)]
        centre_GC = torch.stack(
            [weight_KC[group].mean(0) if group else centre_GC[number] for number, group in enumerate(members)]
        )
    return [group for group in members if group]
