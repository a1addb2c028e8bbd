"""The tiny model's training data, in order: what is at each place, transcribing and indexing scenes, questions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ..places_ms_resampler import cell_centres
from .scenes import (
    COLOURS,
    HEIGHTS,
    INDEX,
    NAMES,
    PLACES,
    TRANSCRIBE,
    Scene,
    ask,
    height_step,
    index_by_name,
    make_record,
    make_scene,
    scene_rng,
    transcript,
)

ALL_NAMES = [name for names in NAMES.values() for name in names]
LABELS = {"colours": 1 + len(COLOURS), "names": 1 + len(ALL_NAMES), "heights": HEIGHTS}  # classes of each
CROWD = 9  # most things in a drill's scene: more to learn from each picture than with questions
DRILL_SHARE = 0.2  # share of the later conversations, so that reading the whole picture is not forgotten
FINDING = ("presence", "where", "relation", "compare", "colour")  # learned last, so asked more often
FINDING_SHARE = 0.5  # of the scenes with questions


class ScenePlaces(Dataset):
    """Scenes with what is at each of the nine places: number of its colour and name, and its height; 0 for nothing."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = make_scene("train", index, max_things=CROWD)
        return {"image": scene.image, **labels_of_places(scene)}


def labels_of_places(scene: Scene) -> dict[str, list[int]]:
    """The labels of ScenePlaces, in reading order of the places."""
    labels = {key: [0] * len(PLACES) for key in LABELS}
    for thing in scene.things:
        place = PLACES.index(thing.place)
        labels["colours"][place] = 1 + list(COLOURS).index(thing.colour)
        labels["names"][place] = 1 + ALL_NAMES.index(thing.name)
        labels["heights"][place] = height_step(thing, scene)
    return labels


class PlacesCollator:
    """Collates a list of ScenePlaces into pixels and labels."""

    def __init__(self, processor):
        self.image_processor = processor.image_processor

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = self.image_processor([record["image"] for record in records], return_tensors="pt")["pixel_values"]
        labels = {key: torch.tensor([record[key] for record in records]) for key in LABELS}
        return {"pixel_values": pixels, **labels}


class Looking(nn.Module):
    """Predicts, with linear heads on every visual token, the colour, name and height of what is at its place.

    This trains the tower and the projector of `model` in place before the language model is trained, in place of a
    pretrained tower. The heads are discarded.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.vision_tower, self.projector = model.vision_tower, model.projector
        self.features_of = [model.get_image_features]  # in a list, so that the language model is not trained here
        width = model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({key: nn.Linear(width, classes) for key, classes in LABELS.items()})

    def forward(self, pixel_values: Tensor, colours: Tensor, names: Tensor, heights: Tensor) -> dict[str, Tensor]:
        """The sum of the heads' cross-entropies; labels are (B, 9)."""
        images = self.features_of[0](pixel_values, return_dict=True)
        y_BMT = torch.stack(images.pooler_output)
        row_M, column_M = (3 * cell_centres(images.token_grids[0], y_BMT.device)).long().unbind(dim=-1)
        place_M = 3 * row_M + column_M
        labels = {"colours": colours, "names": names, "heights": heights}
        losses = [
            cross_entropy(head(y_BMT).flatten(0, 1).float(), labels[key][:, place_M].flatten())
            for key, head in self.heads.items()
        ]
        return {"loss": torch.stack(losses).sum()}


class SceneConversations(Dataset):
    """`length` conversations about scenes: the first `drills` are drills, the others ask `turns` questions.

    A drill transcribes the picture place by place, or indexes it name by name. Questions alone hardly teach the model
    to find things; an index lists all of a picture's names in one text, each next to its answer. `blind` omits the
    images, for the model that can only guess.
    """

    def __init__(self, length: int, drills: int, turns: int, blind: bool = False):
        self.length, self.drills, self.turns, self.blind = length, drills, turns, blind

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = scene_rng("train", index, 2)
        if index < self.drills or rng.random() < DRILL_SHARE:
            scene = make_scene("train", index, max_things=CROWD)
            drills = (TRANSCRIBE, transcript(scene)), (INDEX, index_by_name(scene, rng))
            turns = [drills[rng.integers(2)]]
        else:
            scene = make_scene("train", index)
            families = FINDING if rng.random() < FINDING_SHARE else None
            turns = [(asked.question, asked.answer) for asked in ask(scene, "train", index, self.turns, families)]
        return make_record(scene, turns, blind=self.blind)
