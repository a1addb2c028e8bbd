"""Numbers of scope maps, and the maps as files."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
from answering import ScopeMaps
from layers import Layer

FILES = ("json", "npz")
GRIDS = ("overview_grid", "token_grid", "patch_grid", "tiles")


def reach(maps: ScopeMaps) -> np.ndarray:
    """How far from itself each token looked in each scope: the mean distance of what it read, in widths of the picture.

    (S, M)
    """
    rows, columns = maps.patch_grid
    patches = (np.indices((rows, columns)).reshape(2, -1).T + 0.5) / (rows, columns)
    widths = np.array([maps.picture.height / maps.picture.width, 1])
    away = np.linalg.norm((maps.places[:, None] - patches) * widths, axis=-1)
    return (maps.attentions * away).sum(axis=-1)


def entropy(maps: ScopeMaps) -> np.ndarray:
    """How widely each token looked in each scope, in bits: 0 for one patch, log2 N for all alike (S, M)."""
    shares = np.where(maps.attentions > 0, maps.attentions, 1)
    return -(shares * np.log2(shares)).sum(axis=-1)


def in_json(maps: ScopeMaps) -> dict[str, Any]:
    """The maps of a picture as lists, with four digits: weights, reach and entropy [scope][token], attentions
    [scope][token][patch].
    """
    arrays = {"weights": maps.weights, "attentions": maps.attentions, "reach": reach(maps), "entropy": entropy(maps)}
    grids = {name: list(getattr(maps, name)) for name in GRIDS}
    return grids | {name: np.round(array, 4).tolist() for name, array in arrays.items()}


def by_head(maps: ScopeMaps, layers: list[Layer]) -> dict[str, np.ndarray]:
    """Of L layers: trust (L, S, M), reach and entropy of every head (L, h, M), and each head's scope (h)."""
    if not layers:
        return {}
    every = [replace(maps, attentions=np.concatenate(layer.heads)) for layer in layers]
    return {
        "layer_weights": np.stack([layer.weights for layer in layers]),
        "head_reach": np.stack([reach(one) for one in every]),
        "head_entropy": np.stack([entropy(one) for one in every]),
        "head_scopes": np.repeat(np.arange(len(layers[0].heads)), [len(heads) for heads in layers[0].heads]),
    }


def as_file(kind: str, scopes: list[str], pictures: list[tuple[ScopeMaps, list[Layer]]]) -> bytes:
    """The maps of several pictures and numbers of their layers, as JSON or as NumPy's npz, whose arrays are named
    `weights_0` and so on.
    """
    if kind == "json":
        images = [
            in_json(maps) | {name: np.round(array, 4).tolist() for name, array in by_head(maps, layers).items()}
            for maps, layers in pictures
        ]
        return json.dumps({"scopes": scopes, "images": images}).encode()
    arrays = {
        f"{name}_{number}": np.asarray(array)
        for number, (maps, layers) in enumerate(pictures)
        for name, array in {
            **{name: getattr(maps, name) for name in GRIDS},
            "places": maps.places,
            "weights": maps.weights,
            "attentions": maps.attentions,
            "reach": reach(maps),
            "entropy": entropy(maps),
            **by_head(maps, layers),
        }.items()
    }
    file = io.BytesIO()
    np.savez_compressed(file, scopes=np.array(scopes), **arrays)
    return file.getvalue()
