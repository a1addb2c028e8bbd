"""The tiny model's training data, in order: what is at each place, transcribing and indexing scenes, questions."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset

from ..places_ms_resampler import cell_centres
from ..training.collate import ConversationCollator, with_budget
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
    pick,
    scene_rng,
    shuffled,
    transcript,
)
from .wordings import NO_PICTURE, THANKS, about_nothing, about_one_of, across, beside, greeting, in_other_words

ALL_NAMES = [name for names in NAMES.values() for name in names]
LABELS = {"colours": 1 + len(COLOURS), "names": 1 + len(ALL_NAMES), "heights": HEIGHTS}  # classes of each
CROWD = 9  # most things in a drill's scene: more to learn from each picture than with questions
DRILL_SHARE = 0.2  # share of the later conversations, so that reading the whole picture is not forgotten
FINDING = ("presence", "where", "relation", "compare", "colour")  # learned last, so asked more often
COUNTING = ("count", "count_colour", "majority")  # forgotten most while the model learns to talk, so asked last
OFTEN_SHARE = 0.5  # of the scenes with questions
OTHER_WORDS = 0.5  # share of the questions that are asked in other words than those of the scenes
ABSENT, GREETED, NO_PICTURES = 0.2, 0.1, 0.01  # shares of the conversations about scenes
SEVERAL = 0.12  # share of the batches, since one long conversation makes a whole batch as long
BATCH = 32
# Tokens for each picture of a batch. The default is the most frequent, since most people will keep it.
BUDGETS = (36, 36, 36, 36, 4, 9, 16, 16, 25, 25, 49, 64, 64, 100, 144, 144)
BUDGETS_OF_SEVERAL = (36, 36, 9, 16)


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


class Imitating(nn.Module):
    """Trains the projector of `model` alone to make the tokens that another projector makes of the same tower."""

    def __init__(self, model: Any, teacher: nn.Module):
        super().__init__()
        self.vision_tower, self.projector, self.teacher = model.vision_tower, model.projector, teacher
        self.token_grid = tuple(model.config.projector_config.visual_tokens)
        for frozen in (self.vision_tower, self.teacher):
            frozen.requires_grad_(False)

    def forward(self, pixel_values: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        """The mean squared error, as a share of the variance of the other projector's tokens."""
        with torch.no_grad():
            x_BCHW = self.vision_tower(pixel_values).last_hidden_state
            x_BNC, grid = x_BCHW.flatten(2).mT, tuple(x_BCHW.shape[-2:])
            wanted_BMT, _ = self.teacher(x_BNC, grid, self.token_grid)
        y_BMT, _ = self.projector(x_BNC, grid, self.token_grid)
        return {"loss": mse_loss(y_BMT, wanted_BMT) / wanted_BMT.var()}


class SceneConversations(Dataset):
    """`length` conversations about scenes: the first `drills` are drills, the others ask `turns` questions.

    A drill transcribes the picture place by place, or indexes it name by name. Questions alone hardly teach the model
    to find things; an index lists all of a picture's names in one text, each next to its answer. Half of the scenes
    with questions are asked about the families `often`. `first` is the number of the first scene. `varied` asks half of
    the questions in other words, greets, asks about absent things, and shows several pictures, or none. `blind` omits
    the images, for the model that can only guess.
    """

    def __init__(
        self,
        length: int,
        drills: int,
        turns: int,
        *,
        often: tuple[str, ...] = FINDING,
        first: int = 0,
        varied: bool = False,
        blind: bool = False,
    ):
        self.length, self.drills, self.turns, self.varied, self.blind = length, drills, turns, varied, blind
        self.often, self.first = often, first

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        drilled, index = index < self.drills, self.first + index
        rng = scene_rng("train", index, 2)
        if drilled or rng.random() < DRILL_SHARE:
            scene = make_scene("train", index, max_things=CROWD)
            drills = (TRANSCRIBE, transcript(scene)), (INDEX, index_by_name(scene, rng))
            return make_record(scene, [drills[rng.integers(2)]], blind=self.blind)
        scene = make_scene("train", index)
        families = self.often if rng.random() < OFTEN_SHARE else None
        asked = [(asked.question, asked.answer) for asked in ask(scene, "train", index, self.turns, families)]
        return self.vary(scene, asked, rng) if self.varied else make_record(scene, asked, blind=self.blind)

    def vary(self, scene: Scene, asked: list[tuple[str, str]], rng: np.random.Generator) -> dict[str, Any]:
        """A conversation in the many ways in which people talk."""
        if rng.random() < NO_PICTURES:
            return make_record(scene, [(in_other_words(asked[0][0], rng), NO_PICTURE)], blind=True)
        if several := scene_rng("train", scene.seed_key[1] // BATCH, 3).random() < SEVERAL:
            scenes = beside(scene, count := int(rng.integers(2, 4)))
            asked = [
                (about_one_of(number, question.question, rng), question.answer)
                for number in map(int, rng.permutation(count))
                for question in ask(scenes[number], *scenes[number].seed_key, self.turns // count)
            ]
            asked = shuffled(asked, rng)
            if count == 2:
                asked[:2] = [across(scenes, rng), across(scenes, rng)]
        else:
            asked = [
                (in_other_words(question, rng) if rng.random() < OTHER_WORDS else question, answer)
                for question, answer in asked
            ]
            if rng.random() < ABSENT:
                asked[int(rng.integers(len(asked)))] = about_nothing(scene, rng)
        if rng.random() < GREETED:
            asked = [greeting(rng), *asked[1:]]
        if rng.random() < GREETED:
            asked[-1] = (pick(THANKS, rng), "You are welcome.")
        return make_record(scene, asked, pictures=[other.image for other in scenes] if several else None)


class BudgetCollator:
    """Collates conversations with a number of visual tokens for each picture that is drawn for the batch."""

    def __init__(self, processor: Any, max_length: int):
        self.collators = {
            budget: ConversationCollator(with_budget(processor, budget), max_length) for budget in set(BUDGETS)
        }

    def __call__(self, records: list[dict[str, Any]]) -> dict[str, Tensor]:
        drawn = np.random.default_rng(zlib.crc32(records[0]["id"].encode()))
        several = any(isinstance(record["image"], list) for record in records)
        return self.collators[pick(BUDGETS_OF_SEVERAL if several else BUDGETS, drawn)](records)
