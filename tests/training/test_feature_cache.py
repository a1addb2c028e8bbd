"""Features of a frozen tower on disk: the same bits, each picture once, and never those of another tower."""

import dataclasses
import shutil

import pytest
import torch
from killed_runs import assert_same_weights
from safetensors.torch import load_file
from tiny_models import TOWERS, pixels, tiny_model
from tiny_runs import options_in, run_interrupted, small
from transformers import CLIPVisionModel

from ms_resampler.towers_ms_resampler import flatten_patches
from ms_resampler.training.feature_cache import cache_features
from ms_resampler.training.recipes import RECIPES, LearningRates
from ms_resampler.training.run import train
from ms_resampler_cli import main as cli


@pytest.fixture
def seen(monkeypatch):
    """The numbers of pictures that CLIP's tower is run on."""
    counts, plain = [], CLIPVisionModel.forward

    def forward(self, pixel_values, **kwargs):
        counts.append(len(pixel_values))
        return plain(self, pixel_values, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", forward)
    return counts


def files_in(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_learns_the_same_bits_and_runs_the_tower_in_one_epoch(bf16, start, tmp_path, seen):
    recipe = small("instruct", steps=None, epochs=2, bf16=bf16)
    train(recipe, **options_in(start, tmp_path / "plain"))
    assert sum(seen) >= 2 * 18
    seen.clear()
    folder = tmp_path / "kept"
    train(recipe, **options_in(start, tmp_path / "cached", features=folder))
    assert_same_weights(tmp_path / "cached", tmp_path / "plain")
    blank = len(files_in(folder)) - 18  # a batch of text alone has a blank picture
    assert blank in (0, 1)
    assert sum(seen) == 18 + blank
    assert len(seen) <= 6 + blank
    seen.clear()
    train(recipe, **options_in(start, tmp_path / "again", features=folder))
    assert_same_weights(tmp_path / "again", tmp_path / "plain")
    assert seen == []
    assert {file.suffix for file in files_in(folder)} == {".safetensors"}
    later = options_in(start, tmp_path / "later", features=folder) | {"model": tmp_path / "plain" / "model"}
    train(recipe, **later)  # a later stage, with the saved tower
    assert seen == []


def test_a_run_that_is_resumed_learns_the_same_bits(start, tmp_path, monkeypatch):
    recipe = small("align", steps=4)
    train(recipe, **options_in(start, tmp_path / "plain"))
    options = options_in(start, tmp_path / "cached", features=tmp_path / "kept")
    run_interrupted(recipe, options, 3, monkeypatch)
    assert_same_weights(tmp_path / "cached", tmp_path / "plain")


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layers", [[-1], [1, -1]])
def test_every_tower_has_the_features_that_it_computes(tower, layers, tmp_path):
    model = tiny_model(tower, vision_feature_layer=layers)
    inputs = {"pixel_values": pixels(3)}
    if tower == "siglip2_vision_model":
        inputs = flatten_patches(inputs["pixel_values"], 4)
        inputs["spatial_shapes"] = torch.tensor([[6, 6], [6, 6], [3, 6]])
        inputs["pixel_attention_mask"][2, 18:] = 0
    with torch.no_grad():
        plain = model.get_image_features(**inputs, return_dict=True)
        cache_features(model, tmp_path, RECIPES["align"]())
        for _ in range(2):
            kept = model.get_image_features(**inputs, return_dict=True)
            assert torch.equal(kept.last_hidden_state, plain.last_hidden_state)
            assert all(map(torch.equal, kept.pooler_output, plain.pooler_output))
        assert len(files_in(tmp_path)) == 3
        few = {name: values[[1, 1]] for name, values in inputs.items()}
        kept = model.get_image_features(**few, return_dict=True).last_hidden_state
        assert torch.equal(kept, plain.last_hidden_state[[1, 1]])
    assert len(files_in(tmp_path)) == 3


def test_what_another_tower_or_precision_makes_is_kept_apart(tmp_path):
    def kept(changes=(), dtype=torch.float32, autocast=False, **config):
        model = tiny_model(**config).to(dtype)
        for name in changes:
            model.model.vision_tower.get_parameter(name).data[0] += 1
        cache_features(model, tmp_path, RECIPES["align"]())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.get_image_features(pixels())
        return len(files_in(tmp_path))

    assert [kept(), kept()] == [1, 1]
    assert kept(["post_layernorm.weight"]) == 2
    assert kept(vision_feature_layer=-1) == 3
    assert kept(tower_changes={"hidden_act": "relu"}) == 4
    assert kept(dtype=torch.bfloat16) == 5
    assert kept(autocast=True) == 6


def test_the_size_is_said_before_training(start, tmp_path, capsys):
    command = ["train", "align", "--model", str(start / "start"), "--data", str(start / "data.json"), "--no-bf16"]
    command += ["--images", str(start / "images"), "--out", str(tmp_path / "run"), "--steps", "1", "--workers", "0"]
    command += ["--batch-size", "2", "--bad-records", "skip", "--cache-features", str(tmp_path / "kept")]
    assert cli.main(command) == 0
    size = 37 * 16 * 4  # patches and a class token
    told = f"at most {size / 1e6:.2f} MB a picture, 0.00 GB for 18 records with one each."
    assert f"Features of the tower are kept in {tmp_path / 'kept'}: {told}" in capsys.readouterr().out
    files = files_in(tmp_path / "kept")
    assert files
    assert all(sum(values.nbytes for values in load_file(file).values()) == size for file in files)


def test_what_cannot_be_kept_is_a_sentence(start, tmp_path, monkeypatch):
    recipe = small("align", rates=LearningRates(tower=1e-5, projector=1e-3))
    options = options_in(start, tmp_path / "run", features=tmp_path / "kept")
    with pytest.raises(ValueError, match="Features of a tower that is trained change with every step: freeze it"):
        train(recipe, **options)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Features could not be kept in .*file \(.*\): make room for them\."):
        train(small("align"), **options | {"features": tmp_path / "file"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="cannot be cached while the tower is sharded: launch with ddp or zero2"):
        cache_features(tiny_model(), tmp_path, dataclasses.replace(recipe, rates=LearningRates(projector=1e-3)))
