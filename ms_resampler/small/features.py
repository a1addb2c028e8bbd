"""The tower's features of many scenes, computed once: two arrays and the scenes' things in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..folders import write_whole
from ..progress import progress
from ..towers_ms_resampler import states_of
from .parts import LAYERS
from .scenes import Painter, Scene

PART = 16  # scenes that are computed at a time
KEPT = 40  # parts from one flush to the next
TOP, FINE = (8, 8, 1280), (16, 16, 112)  # grids and widths of the two layers that are read


class Features:
    """The features of the first `count` scenes of a painter, float16 on the disk; continues where it was stopped."""

    def __init__(self, folder: Path, painter: Painter, count: int):
        self.folder, self.painter, self.count = folder, painter, count
        folder.mkdir(parents=True, exist_ok=True)
        self.top, self.fine = (self._open(name, shape) for name, shape in (("top", TOP), ("fine", FINE)))
        self.done = folder / "scenes.json"
        self.scenes: list[Any] = json.loads(self.done.read_text()) if self.done.is_file() else []

    def _open(self, name: str, shape: tuple[int, int, int]) -> np.memmap:
        path, whole = self.folder / f"{name}.npy", (self.count, shape[0] * shape[1], shape[2])
        if not path.is_file():
            return np.lib.format.open_memmap(path, "w+", np.float16, whole)
        found = np.lib.format.open_memmap(path, "r+")
        if found.shape != whole:
            raise ValueError(f"{path} has features of {len(found)} scenes, not of {self.count}: give another folder.")
        return found

    def _draw(self, numbers: Sequence[int]) -> list[Scene]:
        return [self.painter.scene(number) for number in numbers]

    @torch.inference_mode()
    def compute(self, model: Any, image_processor: Any) -> None:
        """Computes what is missing, with the tower of `model`."""
        tower = model.model.vision_tower
        about = {"desc": f"features: {self.folder.name}", "unit": "scene", "initial": len(self.scenes)}
        with progress(total=self.count, **about) as done:
            missing: Any = range(len(self.scenes), self.count)
            # Another process draws while the tower runs here.
            for scenes in DataLoader(missing, PART, num_workers=1, collate_fn=self._draw, prefetch_factor=4):
                begin = len(self.scenes)
                pixels = image_processor([scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
                states = states_of(tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True))
                part = slice(begin, begin + len(scenes))
                for array, state in ((self.top, states[LAYERS[0]]), (self.fine, states[LAYERS[1]])):
                    array[part] = state.flatten(2).mT.half().cpu().numpy()
                self.scenes += [{"nouns": scene.nouns, "boxes": scene.boxes} for scene in scenes]
                done.update(len(scenes))
                if begin // PART % KEPT == KEPT - 1 or len(self.scenes) == self.count:
                    self.top.flush()
                    self.fine.flush()
                    write_whole(self.done, json.dumps(self.scenes))

    def patches(self, numbers: Sequence[int]) -> Tensor:
        """What the projector reads of some scenes (B, 256, 1392): the coarse patches repeated beside the fine ones."""
        top_BNC, fine_BNC = (
            torch.from_numpy(np.stack([array[number] for number in numbers])).float() for array in (self.top, self.fine)
        )
        top_BCHW = F.interpolate(top_BNC.mT.unflatten(-1, TOP[:2]), FINE[:2])
        return torch.cat([top_BCHW.flatten(2).mT, fine_BNC], dim=-1)
