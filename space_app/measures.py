"""Numbers of scope maps, and the maps as files."""

import io
import json
from typing import Any

import numpy as np
from answering import ScopeMaps

FILES = ("json", "npz")


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
    grids = {"token_grid": list(maps.token_grid), "patch_grid": list(maps.patch_grid)}
    return grids | {name: np.round(array, 4).tolist() for name, array in arrays.items()}


def as_file(kind: str, scopes: list[str], pictures: list[ScopeMaps]) -> bytes:
    """The maps of several pictures, as JSON or as NumPy's npz, whose arrays are named `weights_0` and so on."""
    if kind == "json":
        return json.dumps({"scopes": scopes, "images": [in_json(maps) for maps in pictures]}).encode()
    arrays = {
        f"{name}_{number}": np.asarray(getattr(maps, name))
        for number, maps in enumerate(pictures)
        for name in ("token_grid", "patch_grid", "places", "weights", "attentions")
    }
    arrays |= {
        f"{make.__name__}_{number}": make(maps) for number, maps in enumerate(pictures) for make in (reach, entropy)
    }
    file = io.BytesIO()
    np.savez_compressed(file, scopes=np.array(scopes), **arrays)
    return file.getvalue()
