"""The small model's words stage: targets, loss, the start from the tower's classes, and features on the disk."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from ms_resampler.small import words
from ms_resampler.small.features import FINE, TOP, Features
from ms_resampler.small.scenes import Scene
from ms_resampler.small.words import CellsCollator, CellsOfScenes, SayingCells, say_the_towers_classes

NOUNS = {"ant": {"classes": [3, 5]}, "bat": {}, "cat": {"classes": [7]}}


@pytest.fixture(autouse=True)
def three_nouns(monkeypatch):
    monkeypatch.setattr(words, "things", lambda: NOUNS)


def test_shares_are_the_covered_areas():
    scene = {"nouns": ["ant", "cat", "cat"], "boxes": [(0, 0, 0.5, 0.5), (0.5, 0.25, 0.75, 1), (0.75, 0.25, 1, 1)]}
    shares = CellsCollator(SimpleNamespace()).shares(scene, (2, 2))
    background = [0, 0.5, 1, 0]
    assert_close(shares, torch.tensor([[1, 0, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0, 1], [0, 0, 1, 0.0]]))
    assert shares[:, -1].tolist() == background
    odd = CellsCollator(SimpleNamespace()).shares(scene, (3, 3))
    assert_close(odd[0], torch.tensor([1, 0, 0, 0.0]))
    assert_close(odd[4], torch.tensor([0.25, 0, 0.5, 0.25]))  # from a third to two thirds: a quarter ant, half cat


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


def test_names_are_scored_by_the_likeliest_words_of_all_tokens():
    """Five pictures of two tokens, whose shares of ant, bat, cat and the background are given."""
    shares = [[[0.9, 0, 0.1, 0], [0, 0, 0, 1]], [[0.6, 0, 0, 0.4], [0, 0.7, 0, 0.3]],
              [[0.5, 0, 0, 0.5], [0, 0, 0.6, 0.4]], [[0, 0.5, 0.2, 0.3], [0.4, 0, 0.3, 0.3]],
              [[0, 0, 1, 0], [0, 0, 1, 0]]]  # fmt: skip
    nouns = [["ant"], ["ant"], ["ant", "bat"], ["ant", "bat", "ant"], ["cat", "cat"]]
    told = SimpleNamespace(eval=lambda: None, says=lambda rows, grid: torch.tensor([shares[row] for row in rows]).log())
    features = SimpleNamespace(count=5, scenes=[{"nouns": found} for found in nouns], patches=list)
    assert words.score_names(told, features, (1, 2)) == {
        "one thing, first": 50.0, "one thing, first five": 100.0, "scene": 50.0
    }  # fmt: skip


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
    whole, parts = (Features(tmp_path / name, Grey(), 40) for name in ("whole", "parts"))
    whole.compute(SimpleNamespace(model=SimpleNamespace(vision_tower=Tower())), image_processor)
    with pytest.raises(KeyboardInterrupt):
        parts.compute(SimpleNamespace(model=SimpleNamespace(vision_tower=Tower(most=20))), image_processor)
    again, tower = Features(tmp_path / "parts", Grey(), 40), Tower()
    again.compute(SimpleNamespace(model=SimpleNamespace(vision_tower=tower)), image_processor)
    assert tower.left == 1000 - 24  # the first 16 were kept
    for features in (whole, again):
        patches = features.patches([0, 17, 39])
        assert patches.shape == (3, FINE[0] * FINE[1], TOP[2] + FINE[2])
        assert patches[:, :, 0].tolist() == [[number + 1.0] * 256 for number in (0, 17, 39)]
        assert patches[:, :, -1].tolist() == [[float(number)] * 256 for number in (0, 17, 39)]
        assert [list(scene["nouns"]) for scene in features.scenes] == [["ant"]] * 40
