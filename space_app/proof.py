"""What an answer rests on: the question is asked again with patches covered, or with a scope switched off."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pictures import Refusal


@dataclass(frozen=True)
class Change:
    """Of one of the pictures, by its number, the patches to cover; or the number of a scope to switch off."""

    picture: int = 0
    patches: tuple[int, ...] = ()
    scope: int | None = None


@dataclass(frozen=True)
class Proof:
    """How likely the answer was before a change and is after it, and what is answered then."""

    before: float
    after: float
    answer: str


def checked_change(picture: Any, patches: Any, scope: Any, patch_counts: list[int], scopes: int) -> Change:
    """A change from what a browser sent, for pictures of so many patches. Raises Refusal if there is no such thing."""
    if scopes > 1 and scope in range(scopes):
        return Change(scope=int(scope))
    count = patch_counts[picture] if picture in range(len(patch_counts)) else 0
    if scope is None and isinstance(patches, list) and patches and all(patch in range(count) for patch in patches):
        return Change(int(picture), tuple(map(int, patches)))
    raise Refusal("There is no such part of the picture and no such scope; please choose again.")


def cover(pixels: torch.Tensor, patches: tuple[int, ...], patch_grid: tuple[int, int]) -> torch.Tensor:
    """A picture's pixels (3, height, width), or its patches as rows, with some patches in the mean colour."""
    pixels = pixels.clone()
    if pixels.ndim == 2:  # a tower that takes patches
        pixels[list(patches)] = pixels[: patch_grid[0] * patch_grid[1]].mean(dim=0)
        return pixels
    mean, (rows, columns) = pixels.mean(dim=(1, 2), keepdim=True), patch_grid
    tall, wide = pixels.shape[1] / rows, pixels.shape[2] / columns
    for row, column in (divmod(patch, columns) for patch in patches):
        top, bottom, left, right = (
            round(edge) for edge in (row * tall, (row + 1) * tall, column * wide, (column + 1) * wide)
        )
        pixels[:, top:bottom, left:right] = mean
    return pixels


@contextmanager
def without_scope(projector: Any, scope: int) -> Iterator[None]:
    """Takes all trust from a scope, in every layer; the others share it.

    Raises Refusal if the projector's trust does not depend on the picture.
    """
    gates = [module for name, module in projector.named_modules() if name.rpartition(".")[2] == "gate"]
    if not gates:
        raise Refusal("The scopes of this projector cannot be switched off.")

    def close(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        # (B, M, S), or (B, S, M, heads) where scopes are branches
        return logits.index_fill(1 if logits.ndim == 4 else -1, torch.tensor(scope, device=logits.device), -torch.inf)

    hooks = [gate.register_forward_hook(close) for gate in gates]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
