"""One run of the study: trains and evaluates a projector and its reader."""

import dataclasses
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ms_resampler.branches_ms_resampler import split_heads
from ms_resampler.folders import write_whole
from ms_resampler.places_ms_resampler import ScopeMaps, cell_centres
from ms_resampler.reducers_ms_resampler import DivPrune, ascending
from ms_resampler.training.trainer import keep_freed_memory

from ..variants import ToldSpace, has_gaussians
from .data import GRID, LABELS, STUDY_FAMILIES, Optimiser, Split, StudyData, prepare_data
from .plan import Run, make_projector
from .reader import HEADS, Batches, Reader, pretrained_reader, reading_loss
from .results import made_with, result_path
from .statistics import overall
from .worlds import covered, in_world

PICTURES_AT_ONCE = 50
SHOWN = 3  # test scenes whose maps are stored


class Student(nn.Module):
    """A projector and the reader behind it."""

    projector: Any
    reader: Reader

    def __init__(self, projector: nn.Module, reader: Reader, patch_grid: tuple[int, int] = GRID):
        super().__init__()
        self.projector, self.reader, self.patch_grid = projector, reader, patch_grid

    def tokens(
        self, x_BNC: Tensor, grid: tuple[int, int], points_BN2: Tensor, reducer: DivPrune | None = None
    ) -> Tensor:
        """Visual tokens of the tower's features, placed at the centres of their cells, or what a reducer leaves.

        `points_BN2`, where the scene is, is for a projector that is told.
        """
        if isinstance(getattr(self.projector, "space", None), ToldSpace):
            self.projector.space.told_BHW = covered(points_BN2.expand(len(x_BNC), -1, -1), self.patch_grid)
        y = self.projector(x_BNC, self.patch_grid, grid)
        y_BMD = y[0] if isinstance(y, tuple) else y
        placed_BMD = self.reader.place(y_BMD, cell_centres(grid, x_BNC.device))
        if reducer is None:
            return placed_BMD
        kept = [ascending(reducer.choose(y_MD)) for y_MD in y_BMD]
        return torch.stack([placed_MD[k] for placed_MD, k in zip(placed_BMD, kept, strict=True)])


def perform(run: Run, out: Path) -> dict[str, Any]:
    """The result of a run, from `OUT/runs` if it exists; else it is trained, evaluated and written there.

    Raises ValueError if the stored result does not say how it was made, as in an early version.
    """
    path = result_path(out, run)
    if path.exists():
        result = json.loads(path.read_text())
        if "made_with" not in result:
            raise ValueError(f"{path} was made by another version of the study: remove it, or work in a new folder.")
        return {**result, "run": dataclasses.asdict(run)}  # under its current name
    keep_freed_memory()
    data = data_of(run, out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, loss, seconds = train(run, data, device)
    result = {
        "run": dataclasses.asdict(run),
        "made_with": made_with(data.folder),
        "parameters": sum(weight.numel() for weight in student.projector.parameters()),
        "seconds": round(seconds, 2),
        "loss": round(loss, 4),
        **examine(student, run, data, device),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result))
    return result


def train(run: Run, data: StudyData, device: torch.device) -> tuple[Student, float, float]:
    """A run's projector and reader, trained; the mean loss of the last fifty steps; and the seconds it took."""
    reader = pretrained_reader(data, run.data.reader_steps)
    torch.manual_seed(run.seed)
    student = Student(make_projector(run.projector, run.patch_grid), reader, run.patch_grid).to(device)
    start = time.perf_counter()
    loss = learn(student, run, data, device)
    return student, loss, time.perf_counter() - start


def data_of(run: Run, out: Path) -> StudyData:
    """The data of a run's settings, in its world."""
    return in_world(prepare_data(out, run.data), run.world, run.data.position_scale)


def learn(student: Student, run: Run, data: StudyData, device: torch.device) -> float:
    """Trains in place; returns the mean loss of the last fifty steps."""
    optimiser = Optimiser([student], run.learning_rate, run.steps)
    batches, grids = Batches(data, run.batch_size, run.seed), random.Random(run.seed)
    features, losses = data.splits["train"].features_BNC, []
    for _ in range(run.steps):
        pictures, *asked = batches.next()
        x_BNC = torch.from_numpy(features[pictures.numpy()].astype(np.float32)).to(device)
        chosen = run.grids if run.together else [grids.choice(run.grids)]
        points_BN2 = data.splits["train"].points_of(pictures).to(device)
        tokens = [student.tokens(x_BNC, grid, points_BN2) for grid in chosen]
        asked = [part.to(device) for part in asked]
        loss = torch.stack([reading_loss(student.reader, y_BMD, *asked) for y_BMD in tokens]).mean()
        optimiser.step(loss)
        losses.append(loss.item())
    return float(np.mean(losses[-50:]))


@torch.inference_mode()
def examine(student: Student, run: Run, data: StudyData, device: torch.device) -> dict[str, Any]:
    """By tokens, the overall score on validation and all scores on test; and where projectors with scopes looked."""
    result: dict[str, Any] = {"validation": {}, "test": {}}
    for grid in run.grids:
        tokens = str(grid[0] * grid[1])
        result["validation"][tokens] = round(overall(score_split(student, grid, data.splits["validation"], device)), 5)
        result["test"][tokens] = score_split(student, grid, data.splits["test"], device)
    if hasattr(student.projector, "config") and student.projector.config.num_scopes:
        result["scopes"] = describe_scopes(student, run.grids[0], data.splits["test"], device)
    return result


def score_split(
    student: Student, grid: tuple[int, int], split: Split, device: torch.device, reducer: DivPrune | None = None
) -> dict[str, str]:
    """For every family one letter a scene: 1 right, 0 wrong, - not asked; "dense" the percent of patches, in hex."""
    words_BFW, answer_BF = split.examination()
    right, dense = [], []
    for rows in batched(len(answer_BF)):
        x_BNC = torch.from_numpy(split.features_BNC[rows].astype(np.float32)).to(device)
        points_BN2 = split.points_of(rows).to(device)
        y_BMD = student.tokens(x_BNC, grid, points_BN2, reducer)
        right.append(student.reader(y_BMD, words_BFW[rows].to(device)).argmax(-1).cpu() == answer_BF[rows])
        logits_BNL = student.reader.probe(y_BMD, points_BN2).cpu()
        dense.append(patches_right(logits_BNL, split.labels_BN2[rows]))
    letters_FB = np.where(answer_BF < 0, "-", np.where(torch.cat(right), "1", "0")).T
    scores = {family: "".join(letters) for family, letters in zip(STUDY_FAMILIES, letters_FB, strict=True)}
    return {**scores, "dense": (100 * torch.cat(dense)).round().to(torch.uint8).numpy().tobytes().hex()}


def batched(count: int) -> Iterator[slice]:
    """Slices of pictures that are evaluated together."""
    return (slice(start, start + PICTURES_AT_ONCE) for start in range(0, count, PICTURES_AT_ONCE))


def patches_right(logits_BNL: Tensor, labels_BN2: Tensor) -> Tensor:
    """The share (B,) of patches with the right name and colour, of those that have or are predicted to have a thing."""
    name_BN, colour_BN = (part.argmax(-1) for part in logits_BNL.split(list(LABELS.values()), dim=-1))
    there_BN = labels_BN2[..., 0] > 0
    right_BN = (name_BN == labels_BN2[..., 0]) & (colour_BN == labels_BN2[..., 1]) & there_BN
    return right_BN.sum(1) / (there_BN | (name_BN > 0)).sum(1)


def describe_scopes(student: Student, grid: tuple[int, int], split: Split, device: torch.device) -> dict[str, Any]:
    """Learned sigmas, each family's fusion weights by scope, and maps of the first few scenes."""
    words_BFW, answer_BF = split.examination()
    trust_BFS = []
    for rows in batched(len(answer_BF)):
        x_BNC = torch.from_numpy(split.features_BNC[rows].astype(np.float32)).to(device)
        y_BMD = student.tokens(x_BNC, grid, split.points_of(rows).to(device))
        maps = student.projector(x_BNC, student.patch_grid, grid, True)[1]
        with last_attention(student.reader) as attention:
            student.reader(y_BMD, words_BFW[rows].to(device))
        trust_BFS.append(torch.einsum("bfm,bsm->bfs", attention(), maps.weights_BSM).cpu())
        if rows.start == 0:
            shown = maps
    asked_BF = (answer_BF >= 0).float()
    trust_FS = torch.einsum("bf,bfs->fs", asked_BF, torch.cat(trust_BFS)) / asked_BF.sum(0)[:, None]
    return {
        "sigmas": head_sigmas(student.projector),
        "trust": {family: row.tolist() for family, row in zip(STUDY_FAMILIES, trust_FS, strict=True)},
        **({"places": shown.places_BM2[:SHOWN].tolist()} if student.projector.config.moving_scopes else {}),
        "maps": as_bytes(shown),
    }


def head_sigmas(projector: Any) -> list[list[float]]:
    """The sigmas of every scope's heads in the last layer, 0 for the global scope; nothing if no prior is Gaussian."""
    prior = projector.layers[-1].prior
    if not has_gaussians(projector):
        return []
    sigma = (prior.precision(torch.float32) ** -0.5).nan_to_num(posinf=0).cpu()
    scope_heads = projector.config.scope_heads or [projector.config.num_attention_heads] * len(sigma)
    return [heads.tolist() for heads in sigma.flatten().split(list(scope_heads))]


def as_bytes(maps: ScopeMaps) -> dict[str, Any]:
    """The maps of the scenes shown: weights in percent, attentions relative to their maximum, in hex."""
    weights_BSM, attentions_BSMN = (part[:SHOWN].cpu() for part in (maps.weights_BSM, maps.attentions_BSMN))
    relative = attentions_BSMN / attentions_BSMN.amax(dim=-1, keepdim=True)
    return {
        "shape": list(attentions_BSMN.shape),
        "weights": (100 * weights_BSM).round().to(torch.uint8).numpy().tobytes().hex(),
        "attentions": (255 * relative).round().to(torch.uint8).numpy().tobytes().hex(),
    }


@contextmanager
def last_attention(reader: Reader) -> Iterator[Any]:
    """While open, keeps what the reader's last block reads; gives a function that returns the attention (B, F, M)
    of the answering states to the visual tokens, mean over heads.
    """
    kept: dict[str, Tensor] = {}
    block: Any = reader.blocks[-1]
    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: kept.__setitem__(name, output))
        for name, module in (("query", block.q_proj), ("key", block.k_proj))
    ]

    def attention() -> Tensor:
        query = split_heads(kept["query"][:, :, 0], HEADS)  # the state before a question's words
        key = split_heads(kept["key"], HEADS)
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)

    try:
        yield attention
    finally:
        for hook in hooks:
            hook.remove()
