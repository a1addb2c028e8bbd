"""What the page shows on request: single layers and heads, of the projector and of the language model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pictures import Refusal
from tiles import Cut, over_picture
from torch import nn

UNKNOWN = "There is no such layer or head; please choose again."


@dataclass(frozen=True)
class Layer:
    """A layer of the projector for one picture: its trust (S, M), and each scope's attention by head (heads, M, N)."""

    weights: np.ndarray
    heads: list[np.ndarray]

    def within(self, maps: Any, scope: int | None, head: int | None) -> Any:
        """The picture's maps as they are in this layer: a mean over heads, but one head for one of the scopes."""
        attentions = [heads.mean(axis=0) for heads in self.heads]
        if scope is not None:
            attentions[scope] = self.heads[scope][head]
        return replace(maps, weights=self.weights, attentions=np.stack(attentions))

    def before(self, other: "Layer", cut: Cut) -> "Layer":
        """This layer as it read the overview, with the other, as it read the whole picture."""
        pairs = [
            (over_picture(one, cut.tile_patches, cut.patches).numpy(), two)
            for one, two in zip(self.heads, other.heads, strict=True)
        ]
        weights = np.concatenate([self.weights, other.weights], axis=1)
        return Layer(weights, [np.concatenate(pair, axis=1) for pair in pairs])


def telling_layers(projector: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The layers that tell their heads, each with the part that takes their mean; code of earlier weights has none."""
    modules = dict(projector.named_modules())
    ends = [name for name in modules if name.rpartition(".")[2] == "mean_over_heads"]
    return [(modules[name.rpartition(".")[0]], modules[name]) for name in ends]


@contextmanager
def layers_read(projector: nn.Module) -> Iterator[list[Layer]]:
    """A list that gets each layer of what the projector reads meanwhile, in order; of a batch, for each in turn."""
    layers: list[Layer] = []
    heads: list[list[np.ndarray]] = []

    def keep_heads(mean: Any, inputs: tuple) -> None:
        parts = [one.float().cpu().split(mean.scope_heads) for one in inputs[0]]
        heads[:] = [[part.numpy() for part in one] for one in parts]

    def keep_layer(_layer: Any, _inputs: tuple, outputs: tuple) -> None:
        weights = outputs[1].weights_BSM.float().cpu().numpy()
        layers.extend(Layer(*one) for one in zip(weights, heads, strict=True))

    hooks = []
    for layer, mean in telling_layers(projector):
        hooks += [mean.register_forward_pre_hook(keep_heads), layer.register_forward_hook(keep_layer)]
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def check_head(told: list[list[int]], layer: Any, scope: Any, head: Any) -> None:
    """Raises Refusal unless a browser named a layer of those told and, if any, a head of one of its scopes."""
    known = is_one_of(layer, len(told))
    if scope is not None or head is not None:
        known = known and is_one_of(scope, len(told[layer])) and is_one_of(head, told[layer][scope])
    if not known:
        raise Refusal(UNKNOWN)


def check_language_head(counts: tuple[int, int], *chosen: Any) -> None:
    """Raises Refusal unless layer and head, where a browser named them, are of as many as there are."""
    if not all(number is None or is_one_of(number, count) for number, count in zip(chosen, counts, strict=True)):
        raise Refusal(UNKNOWN)


def is_one_of(number: Any, count: int) -> bool:
    """Whether it is a whole number below the count."""
    return type(number) is int and 0 <= number < count


class Usual:
    """The mean trust over pictures (L, S, M), by the grid of tokens."""

    def __init__(self, trusts: list[tuple[tuple[int, int], np.ndarray]]):
        grids = dict.fromkeys(grid for grid, _ in trusts)
        self.means = {grid: np.mean([trust for other, trust in trusts if other == grid], axis=0) for grid in grids}

    def in_grid(self, grid: tuple[int, int]) -> np.ndarray:
        """The mean trust of a grid's tokens; of a grid that no picture had, each scope's mean; without scopes, none."""
        if grid in self.means:
            return self.means[grid]
        scopes = np.mean([mean.mean(axis=-1) for mean in self.means.values()] or [np.zeros((1, 0))], axis=0)
        return np.repeat(scopes[..., None], grid[0] * grid[1], axis=-1)

    def for_tokens(self, maps: Any) -> np.ndarray:
        """The mean trust for the tokens of a picture: of the overview, if there is one, and of the picture."""
        return np.concatenate([self.in_grid(maps.overview_grid), self.in_grid(maps.token_grid)], axis=-1)
