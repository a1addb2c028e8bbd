"""What the tiny model learns from, in order: to look at places, to transcribe, and to answer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from ..resampler_ms_resampler import cell_centres
from .scenes import COLOURS, NAMES, PLACES, TRANSCRIBE, Scene, ask, make_record, make_scene, scene_rng, transcript

ALL_NAMES = [name for names in NAMES.values() for name in names]
TRANSCRIPT_SHARE = 0.1  # of the later conversations, so that reading the whole picture is not forgotten


class ScenePlaces(Dataset):
    """Scenes with what is at each of the nine places: number of its colour and of its name, 0 for nothing."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = make_scene("train", index)
        return {"image": scene.image, **labels_of_places(scene)}


def labels_of_places(scene: Scene) -> dict[str, list[int]]:
    """The labels of ScenePlaces, in reading order of the places."""
    colours, names = [0] * len(PLACES), [0] * len(PLACES)
    for thing in scene.things:
        place = PLACES.index(thing.place)
        colours[place] = 1 + list(COLOURS).index(thing.colour)
        names[place] = 1 + ALL_NAMES.index(thing.name)
    return {"colours": colours, "names": names}


class PlacesCollator:
    """Makes pixels and labels of a list of ScenePlaces."""

    def __init__(self, processor):
        self.image_processor = processor.image_processor

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = self.image_processor([record["image"] for record in records], return_tensors="pt")["pixel_values"]
        labels = {key: torch.tensor([record[key] for record in records]) for key in ("colours", "names")}
        return {"pixel_values": pixels, **labels}


class Looking(nn.Module):
    """Asks every visual token, through two linear heads, for the colour and name of what is at its place.

    It trains the tower and the projector inside `model`, in place, before a language model reads them: it stands
    in for the pretrained tower that other models start from. The heads are thrown away.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.vision_tower, self.projector = model.vision_tower, model.projector
        self.features_of = [model.get_image_features]  # in a list: the language model is not to be trained here
        width = model.config.text_config.hidden_size
        self.colour_head = nn.Linear(width, 1 + len(COLOURS))
        self.name_head = nn.Linear(width, 1 + len(ALL_NAMES))

    def forward(self, pixel_values: Tensor, colours: Tensor, names: Tensor) -> dict[str, Tensor]:
        """The sum of both heads' cross-entropies; labels are (B, 9)."""
        images = self.features_of[0](pixel_values, return_dict=True)
        y_BMT = torch.stack(images.pooler_output)
        row_M, column_M = (3 * cell_centres(images.token_grids[0], y_BMT.device)).long().unbind(dim=-1)
        place_M = 3 * row_M + column_M
        losses = [
            cross_entropy(head(y_BMT).flatten(0, 1).float(), labels[:, place_M].flatten())
            for head, labels in ((self.colour_head, colours), (self.name_head, names))
        ]
        return {"loss": losses[0] + losses[1]}


class SceneConversations(Dataset):
    """`length` conversations about scenes: the first `transcripts` transcribe them, the others ask `turns` questions.

    `blind` leaves the images out, for the model that may only guess.
    """

    def __init__(self, length: int, transcripts: int, turns: int, blind: bool = False):
        self.length, self.transcripts, self.turns, self.blind = length, transcripts, turns, blind

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = make_scene("train", index)
        if index < self.transcripts or scene_rng("train", index, 2).random() < TRANSCRIPT_SHARE:
            turns = [(TRANSCRIBE, transcript(scene))]
        else:
            turns = [(asked.question, asked.answer) for asked in ask(scene, "train", index, self.turns)]
        return make_record(scene, turns, blind=self.blind)
