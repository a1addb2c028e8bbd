"""Data that all runs of the study share: features of scenes from one frozen tower, questions, and labels of patches.

The tower is trained to name what is under each patch, without any projector; its features are computed once.
Everything is cached in a folder named after its settings.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ConvNextConfig, ConvNextModel

from ms_resampler.folders import whole_file, write_whole
from ms_resampler.places_ms_resampler import cell_centres, sincos_positions
from ms_resampler.tiny.curriculum import ALL_NAMES
from ms_resampler.tiny.model import keep_variance
from ms_resampler.tiny.scenes import COLOURS, FAMILIES, HEIGHTS, PLACES, Question, Scene, ask, height_step, make_scene

from .workers import worker_pool

GRID, PATCH_PIXELS, CHANNELS = (12, 12), 8, 128
PATCHES = GRID[0] * GRID[1]
CROWD = 9  # things at most on a picture
LABELS = {"name": 1 + len(ALL_NAMES), "colour": 1 + len(COLOURS)}  # classes of a patch; 0 is paper
# "describe" has no single answer; the dense probe asks the same.
STUDY_FAMILIES = {name: family.group for name, family in FAMILIES.items() if name != "describe"}
FILLERS = frozenset({"a", "an", "are", "as", "at", "do", "has", "in", "is", "of", "or", "see", "the", "there", "you"})
FILLERS |= {"thing", "things", "word"}
WORDS_AT_MOST = 6
BATCH = 64
TOWER = "tower.safetensors"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSettings:
    """The size of the data. Each setting has its own folder.

    `position_scale` is that of the sin-cos codes of patches that are added to features of unit scale: a ViT's features
    contain their position, a ConvNeXt's do not, and some projectors need it.
    """

    train_scenes: int = 12_000
    validation_scenes: int = 300
    test_scenes: int = 400
    questions: int = 24  # of each training scene
    tower_steps: int = 1_200
    position_scale: float = 0.5
    reader_steps: int = 4_000

    @property
    def name(self) -> str:
        """The folder's name: a hash of the settings."""
        return digest(dataclasses.asdict(self))


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Scenes of a split. Q is the number of questions, W that of words.

    features_BNC: half precision and memory-mapped, or made when asked for (worlds.py); labels_BN2: name and colour of
    each patch; image_Q, family_Q, words_QW and answer_Q: the questions, those of a scene adjacent; points_BN2: the
    centres (y, x) of the labelled patches, or (1, N, 2) if they are the same in all pictures.
    """

    features_BNC: Any
    labels_BN2: Tensor
    image_Q: Tensor
    family_Q: Tensor
    words_QW: Tensor
    answer_Q: Tensor
    points_BN2: Tensor = field(default_factory=lambda: cell_centres(GRID)[None])

    @property
    def first_question_B(self) -> Tensor:
        """The number of each scene's first question."""
        return torch.searchsorted(self.image_Q, torch.arange(len(self.labels_BN2)))

    def points_of(self, pictures: Tensor | slice) -> Tensor:
        """The centres of the labelled patches of some pictures."""
        return self.points_BN2[pictures] if len(self.points_BN2) > 1 else self.points_BN2

    def examination(self) -> tuple[Tensor, Tensor]:
        """One question of each family per scene: words (B, F, W) and answers (B, F), -1 if there is none."""
        shape = len(self.labels_BN2), len(STUDY_FAMILIES)
        words_BFW, answer_BF = torch.zeros(*shape, WORDS_AT_MOST, dtype=torch.long), torch.full(shape, -1)
        words_BFW[self.image_Q, self.family_Q] = self.words_QW
        answer_BF[self.image_Q, self.family_Q] = self.answer_Q
        return words_BFW, answer_BF


@dataclass(frozen=True)
class StudyData:
    """The splits, the words that questions are made of, and the answers there are."""

    folder: Path
    splits: dict[str, Split]
    words: list[str]
    answers: list[str]


# --- Scenes as tensors ------------------------------------------------------------------------------------------


def study_scene(split: str, index: int) -> Scene:
    """Scene `index` of a split, with one to nine things."""
    return make_scene(split, index, max_things=CROWD)


def patch_labels(scene: Scene) -> np.ndarray:
    """Name and colour of the thing whose box holds each patch's centre, (N, 2); 0 for paper."""
    labels = np.zeros((*GRID, 2), np.uint8)
    rows, columns = ((np.arange(n) + 0.5) * PATCH_PIXELS for n in GRID)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        covered = np.ix_((rows >= top) & (rows < bottom), (columns >= left) & (columns < right))
        labels[covered] = 1 + ALL_NAMES.index(thing.name), 1 + list(COLOURS).index(thing.colour)
    return labels.reshape(PATCHES, 2)


def content_words(question: str) -> list[str]:
    """A question without its filler words: "Is the red 7 left of the star?" -> red 7 left star."""
    return [word for word in re.findall(r"\w+", question.lower()) if word not in FILLERS]


def questions_of(scene: Scene, split: str, index: int, count: int) -> list[Question]:
    """`count` questions for training, evenly from all families; for other splits one question of each family."""
    if split == "train":
        return ask(scene, split, index, count, STUDY_FAMILIES)
    asked = ask(scene, split, index, 4 * len(STUDY_FAMILIES), STUDY_FAMILIES)
    return list({question.family: question for question in reversed(asked)}.values())[::-1]


def described_scene(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What stands at each of the nine places: (9, 3) name, colour, height step; and (9, 2) its centre (y, x)."""
    things = np.zeros((len(PLACES), 3), np.uint8)
    centres = np.array([((n // 3 + 0.5) / 3, (n % 3 + 0.5) / 3) for n in range(len(PLACES))], np.float32)
    for thing in scene.things:
        place = PLACES.index(thing.place)
        things[place] = (
            1 + ALL_NAMES.index(thing.name),
            1 + list(COLOURS).index(thing.colour),
            height_step(thing, scene),
        )
        centres[place] = thing.centre[1] / scene.image.height, thing.centre[0] / scene.image.width
    assert things[:, 2].max() < HEIGHTS
    return things, centres


@dataclass(frozen=True)
class DrawnScene:
    """The study's data of a scene; questions as family number, content words and answer."""

    image_HW3: np.ndarray
    labels_N2: np.ndarray
    described: tuple[np.ndarray, np.ndarray]
    questions: list[tuple[int, list[str], str]]


def draw_scene(split: str, questions: int, index: int) -> DrawnScene:
    """Scene `index` of a split, drawn and asked."""
    scene, families = study_scene(split, index), list(STUDY_FAMILIES)
    asked = questions_of(scene, split, index, questions)
    return DrawnScene(
        np.asarray(scene.image),
        patch_labels(scene),
        described_scene(scene),
        [(families.index(each.family), content_words(each.question), each.answer) for each in asked],
    )


# --- The tower --------------------------------------------------------------------------------------------------


def make_tower() -> nn.Module:
    """A ConvNeXt of one stage: 12 x 12 patches of 8 pixels, 128 channels."""
    side = GRID[0] * PATCH_PIXELS
    tower = ConvNextModel(
        ConvNextConfig(
            image_size=side,
            patch_size=PATCH_PIXELS,
            num_stages=1,
            depths=[3],
            hidden_sizes=[CHANNELS],
            layer_scale_init_value=0.5,
        )
    )
    keep_variance(tower)
    return tower


def see(tower: nn.Module, pixels_BHWC: Tensor) -> Tensor:
    """Patch features (B, N, C) of pictures (B, H, W, 3) in bytes."""
    pixels_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    return tower(pixels_BCHW).last_hidden_state.flatten(2).mT


def train_tower(scenes: Sequence[DrawnScene], steps: int) -> nn.Module:
    """A tower trained, without any projector, to predict the name and colour of what is under each patch."""
    torch.manual_seed(0)
    tower, head = make_tower(), nn.Linear(CHANNELS, sum(LABELS.values()))
    optimiser = Optimiser([tower, head], 2e-3, steps)
    for step in range(steps):
        chosen = [scenes[n] for n in torch.randint(len(scenes), (BATCH,)).tolist()]
        labels_BN2 = torch.from_numpy(np.stack([scene.labels_N2 for scene in chosen])).long()
        optimiser.step(patch_loss(head(see(tower, pixels_of(chosen))), labels_BN2))
        if (step + 1) % 100 == 0:
            print(f"  tower: step {step + 1} of {steps}", flush=True)
    return tower.eval()


def pixels_of(scenes: Sequence[DrawnScene]) -> Tensor:
    """Pictures (B, H, W, 3) of scenes, in bytes."""
    return torch.from_numpy(np.stack([scene.image_HW3 for scene in scenes]))


def patch_loss(logits_BPL: Tensor, labels_BP2: Tensor) -> Tensor:
    """Cross-entropy of names and colours of patches, from the logits of both side by side."""
    parts = logits_BPL.split(list(LABELS.values()), dim=-1)
    return torch.stack(
        [cross_entropy(part.flatten(0, 1), labels_BP2[..., n].flatten()) for n, part in enumerate(parts)]
    ).sum()


class Optimiser:
    """AdamW with clipped gradients, 40 steps of warm-up, and a linear fall to zero over the second half."""

    def __init__(self, modules: list[nn.Module], learning_rate: float, steps: int):
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.02, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min(1.0, (step + 1) / 40, (steps - step) / (0.5 * steps))
        )

    def step(self, loss: Tensor) -> None:
        """One optimiser step."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


# --- The cache --------------------------------------------------------------------------------------------------


def data_folder(out: Path, settings: DataSettings) -> Path:
    """Where data, tower and reader lie: `OUT/data-HASH`."""
    return out / f"data-{settings.name}"


def prepare_data(out: Path, settings: DataSettings, workers: int | None = None) -> StudyData:
    """The study's data, made on first use; scenes are drawn by several processes (default: one per core)."""
    folder = data_folder(out, settings)
    if not (folder / "vocabulary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder, settings, workers or os.cpu_count() or 1)
    return load_data(folder)


def make_data(folder: Path, settings: DataSettings, workers: int) -> None:
    """Trains the tower, and writes features, labels and questions; the vocabulary last, which completes them."""
    with worker_pool(workers) as pool:
        drawn = {split: draw_scenes(split, settings, pool) for split in SPLITS}
    if not (folder / TOWER).exists():
        save_whole(train_tower(drawn["train"], settings.tower_steps), folder / TOWER)
    tower = make_tower().eval()
    tower.load_state_dict(load_file(folder / TOWER))
    words: dict[str, int] = {"": 0}
    answers: dict[str, int] = {}
    scale = see(tower, pixels_of(drawn["train"][:BATCH])).std().item()
    for split, scenes in drawn.items():
        write_features(tower, scenes, scale, settings.position_scale, folder / f"{split}.npy")
        save_file(number_questions(scenes, words, answers), folder / f"{split}.safetensors")
    write_whole(folder / "vocabulary.json", json.dumps({"words": list(words), "answers": list(answers)}))


def draw_scenes(split: str, settings: DataSettings, pool: ProcessPoolExecutor) -> list[DrawnScene]:
    """All scenes of a split, drawn by a pool of processes."""
    count = getattr(settings, f"{split}_scenes")
    drawn = list(pool.map(partial(draw_scene, split, settings.questions), range(count), chunksize=50))
    print(f"  {split}: {count} scenes", flush=True)
    return drawn


def save_whole(module: nn.Module, path: Path) -> None:
    """Writes a module's weights atomically."""
    with whole_file(path) as fresh:
        save_file(module.state_dict(), fresh)


@torch.inference_mode()
def write_features(
    tower: nn.Module, scenes: Sequence[DrawnScene], scale: float, position_scale: float, path: Path
) -> None:
    """Features of all scenes of a split, divided by their scale in training, with the codes of places."""
    codes_NC = place_codes(GRID, position_scale)
    features = open_memmap(path, "w+", np.float16, (len(scenes), PATCHES, CHANNELS))
    for start in range(0, len(scenes), BATCH):
        rows = slice(start, start + BATCH)
        features[rows] = (see(tower, pixels_of(scenes[rows])) / scale).numpy() + codes_NC
    features.flush()


@cache
def place_codes(grid: tuple[int, int], position_scale: float) -> np.ndarray:
    """The position codes (N, C) added to the features of a grid's patches."""
    return (position_scale * sincos_positions(cell_centres(grid), CHANNELS)).numpy()


def number_questions(scenes: Sequence[DrawnScene], words: dict[str, int], answers: dict[str, int]) -> dict[str, Tensor]:
    """Labels, questions and descriptions of a split's scenes; adds what is new to the words and the answers."""
    rows: list[list[int]] = []
    for index, scene in enumerate(scenes):
        for family, asked, answer in scene.questions:
            ids = [words.setdefault(word, len(words)) for word in asked]
            number = answers.setdefault(answer, len(answers))
            rows.append([index, family, number, *ids, *[0] * (WORDS_AT_MOST - len(ids))])
    table = torch.tensor(rows)
    things, centres = zip(*(scene.described for scene in scenes), strict=True)
    return {
        "labels": torch.from_numpy(np.stack([scene.labels_N2 for scene in scenes])),
        "things": torch.from_numpy(np.stack(things)),
        "centres": torch.from_numpy(np.stack(centres)),
        **{key: table[:, column].clone() for column, key in enumerate(("image", "family", "answer"))},
        "words": table[:, 3:].clone(),
    }


def load_data(folder: Path) -> StudyData:
    """Reads what `make_data` wrote; features stay on disk until they are used."""
    splits = {}
    for name in SPLITS:
        tensors = load_file(folder / f"{name}.safetensors")
        splits[name] = Split(
            np.load(folder / f"{name}.npy", mmap_mode="r"),
            *(tensors[key] for key in ("labels", "image", "family", "words", "answer")),
        )
    return StudyData(folder, splits, **json.loads((folder / "vocabulary.json").read_text()))
