"""The small model's words stage: targets, loss, the start from the tower's classes, and features on the disk."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ms_resampler.small import parts, words
from ms_resampler.small.features import FINE, TOP, Features
from ms_resampler.small.scenes import Scene
from ms_resampler.small.words import CellsCollator, CellsOfScenes, SayingCells, say_the_towers_classes

NOUNS = {"ant": {"classes": [3, 5]}, "bat": {}, "cat": {"classes": [7]}}


@pytest.fixture(autouse=True)
def three_nouns(monkeypatch):
    for module in (words, parts):
        monkeypatch.setattr(module, "things", lambda: NOUNS)


def test_of_what_is_in_its_cell_a_token_says_what_where_and_how_many():
    scene = {"nouns": ["ant", "cat", "cat"], "boxes": [(0, 0, 0.5, 0.5), (0.5, 0.25, 0.75, 1), (0.75, 0.25, 1, 1)]}
    ant, cats = words.said_of("ant", scene["boxes"][0], 1), [words.said_of("cat", box, 2) for box in scene["boxes"][1:]]
    assert ant == pytest.approx(
        {"ant": 0.5, "left": 0.1125, "right": 0.0375, "top": 0.1125, "bottom": 0.0375, "one": 0.2}
    )
    assert (cats[1]["right"], cats[1]["bottom"], cats[1]["two"]) == pytest.approx((0.15 * 0.875, 0.15 * 0.625, 0.2))
    collator, empty = CellsCollator(SimpleNamespace()), {"background": 1.0}

    def mixed(*parts):
        """Shares in the order of the words."""
        return torch.tensor([sum(weight * said.get(word, 0) for weight, said in parts) for word in collator.numbers])

    shares = collator.shares(scene, (2, 2))
    assert_close(shares[0], mixed((1, ant)))
    assert_close(shares[1], mixed((0.25, cats[0]), (0.25, cats[1]), (0.5, empty)))
    assert_close(shares[2], mixed((1, empty)))
    # From a third to two thirds: a quarter ant, half cat.
    assert_close(collator.shares(scene, (3, 3))[4], mixed((0.25, ant), (0.5, cats[0]), (0.25, empty)))


class Echo(nn.Module):
    """A projector that returns what it is given."""

    def forward(self, x_BNC, patch_grid, token_grid):
        return x_BNC


def saying():
    table = nn.Embedding(9, 6)
    model = SimpleNamespace(
        model=SimpleNamespace(projector=Echo()),
        config=SimpleNamespace(visual_words=[4, 2, 7, 1], projector_config=SimpleNamespace(num_scopes=0)),
        get_input_embeddings=lambda: table,
    )
    return SayingCells(model), table.weight.detach()[[4, 2, 7, 1]]


def test_the_loss_is_cross_entropy_with_less_background():
    module, table = saying()
    tokens, shares = torch.randn(2, 4, 6), torch.rand(2, 4, 4)
    total = 0.0
    for token, share in zip(tokens.flatten(0, 1), shares.flatten(0, 1), strict=True):
        scores = [float(token @ word) for word in table]
        whole = math.log(sum(math.exp(score) for score in scores))
        weights = [1, 1, 1, words.BACKGROUND_WEIGHT]
        total -= sum(w * float(s) * (score - whole) for w, s, score in zip(weights, share, scores, strict=True))
    assert_close(module(tokens, shares)["loss"].item(), total / 8, rtol=1e-5, atol=1e-5)


def test_the_towers_classes_are_said_untrained(monkeypatch):
    """A patch that the tower's classifier takes for class 7 makes the pooled MLP say cat, and one of class 3 ant."""
    torch.manual_seed(0)
    weight = torch.randn(10, 20)
    monkeypatch.setattr(words, "tower_classes", lambda: (weight, torch.zeros(10)))
    table = torch.randn(4, 8)
    first, last = nn.Linear(24, 8), nn.Linear(8, 8)
    projector = SimpleNamespace(mlp=nn.Sequential(first, nn.GELU(), last))
    say_the_towers_classes(projector, table)
    for number, said in ((7, 2), (3, 0), (5, 0)):
        patch = torch.cat([weight[number], torch.zeros(4)])
        scores = projector.mlp(patch) @ table.T
        assert scores.argmax() == said
        assert scores[said] > 2 * scores.sort().values[-2].abs()
    assert not any(p.requires_grad for p in projector.mlp.parameters())


def test_every_scene_is_learned_in_every_epoch_in_another_order():
    order = CellsOfScenes(SimpleNamespace(count=40), 80, 8)
    numbers = [order[index]["number"] for index in range(80)]
    assert sorted(numbers[:40]) == sorted(numbers[40:]) == list(range(40))
    assert numbers[:40] != numbers[40:]
    grids = [order[index]["grid"] for index in range(80)]
    assert all(len(set(grids[step : step + 8])) == 1 for step in range(0, 80, 8))
    assert len(set(grids)) > 1


class Tower:
    """States that tell which picture they are of; stops after some pictures, as if it were killed."""

    device, dtype = "cpu", torch.float32

    def __init__(self, most=1000):
        self.left = most

    def __call__(self, pixels, output_hidden_states):
        self.left -= len(pixels)
        if self.left < 0:
            raise KeyboardInterrupt
        value = pixels.mean((1, 2, 3))[:, None, None, None]
        states = [value.expand(-1, FINE[2], *FINE[:2])] * 12 + [value.expand(-1, TOP[2], *TOP[:2]) + 1]
        return SimpleNamespace(hidden_states=states, last_hidden_state=states[-1])


class Grey:
    """A painter of grey pictures."""

    def scene(self, number):
        return Scene(Image.new("RGB", (4, 4), (number, number, number)), ("ant",), ((0, 0, 1, 1),))


def image_processor(images, return_tensors):
    return {"pixel_values": torch.tensor([[[[float(image.getpixel((0, 0))[0])]]] for image in images])}


def test_features_continue_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("ms_resampler.small.features.KEPT", 1)
    whole, pieces = (Features(tmp_path / name, Grey(), 40) for name in ("whole", "parts"))
    whole.compute(SimpleNamespace(model=SimpleNamespace(vision_tower=Tower())), image_processor)
    with pytest.raises(KeyboardInterrupt):
        pieces.compute(SimpleNamespace(model=SimpleNamespace(vision_tower=Tower(most=20))), image_processor)
    again, tower = Features(tmp_path / "parts", Grey(), 40), Tower()
    again.compute(SimpleNamespace(model=SimpleNamespace(vision_tower=tower)), image_processor)
    assert tower.left == 1000 - 24  # the first 16 were kept
    for features in (whole, again):
        patches = features.patches([0, 17, 39])
        assert patches.shape == (3, FINE[0] * FINE[1], TOP[2] + FINE[2])
        assert patches[:, :, 0].tolist() == [[number + 1.0] * 256 for number in (0, 17, 39)]
        assert patches[:, :, -1].tolist() == [[float(number)] * 256 for number in (0, 17, 39)]
        assert [list(scene["nouns"]) for scene in features.scenes] == [["ant"]] * 40
