"""`ms_resampler.ask`: what it says is what the model and the processor say by themselves."""

import pytest
import space_server
import tiny_models
import torch
from torch.testing import assert_close

import ms_resampler
from ms_resampler.answers import load
from ms_resampler.packing_ms_resampler import PackedLinear

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in space_server.make_model():
        part.save_pretrained(folder)
    return folder


def expected(model, processor, pictures, new_tokens=20):
    """The answer by transformers' own two steps, and the maps by another."""
    inputs = tiny_models.asked(processor, QUESTION, *pictures)
    ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_answer_to_files_and_images_is_the_models(folder, tmp_path):
    pictures = [tiny_models.picture(), tiny_models.picture(seed=1)]
    pictures[0].save(tmp_path / "a.png")
    pieces = []
    model, processor = load(folder)
    answer = ms_resampler.ask(
        QUESTION, [tmp_path / "a.png", pictures[1]], folder, max_new_tokens=20, scopes=True, on_text=pieces.append
    )
    assert answer.text == expected(model, processor, pictures) != ""
    assert "".join(pieces).strip() == answer.text
    assert len(pieces) > 1
    assert answer.visual_tokens == [4, 4]
    assert answer.milliseconds > 0
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        maps = model.get_image_features(pixels, output_scopes=True, return_dict=True).scope_weights
    for told, weights_SM in zip(answer.scope_weights, maps, strict=True):
        assert list(told) == ["local", "regional", "global"]
        assert_close(torch.tensor(list(told.values())), weights_SM.mean(dim=1))


@pytest.mark.parametrize(("budget", "tokens"), [(9, 9), ((2, 3), 6)])
def test_a_loaded_model_takes_another_budget(folder, budget, tokens):
    model, processor = load(folder)
    answer = ms_resampler.ask(QUESTION, tiny_models.picture(), model, processor, visual_tokens=budget, max_new_tokens=1)
    assert answer.visual_tokens == [tokens]
    assert answer.scope_weights is None


def test_text_alone_is_answered(folder):
    model, processor = load(folder)
    answer = ms_resampler.ask(QUESTION, [], model, processor, max_new_tokens=20, scopes=True)
    assert answer.text == expected(model, processor, [])
    assert (answer.visual_tokens, answer.scope_weights) == ([], None)


def test_maps_are_made_only_when_asked_for(folder, monkeypatch):
    model, processor = load(folder)
    asked = []
    features = model.get_image_features
    monkeypatch.setattr(
        model, "get_image_features", lambda *a, **k: asked.append(k.get("output_scopes")) or features(*a, **k)
    )
    for scopes in (False, True):
        ms_resampler.ask(QUESTION, tiny_models.picture(), model, processor, max_new_tokens=1, scopes=scopes)
    assert asked == [False, True]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
def test_weights_are_packed_on_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = load(folder)
    assert isinstance(model.lm_head, PackedLinear)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"question": " "}, "question is empty"),
        ({"pictures": "missing.png"}, "There is no picture file 'missing.png'"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"visual_tokens": 1000}, "1000 visual tokens is impossible"),
        ({"processor": None}, "needs its processor"),
        ({"model": "/no/such/folder"}, "neither a folder nor"),
        ({"model": "qwen.gguf"}, "init --llm qwen.gguf"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_said(folder, changes, sentence):
    model, processor = load(folder)
    question = {"question": QUESTION, "pictures": tiny_models.picture(), "model": model, "processor": processor}
    with pytest.raises(ValueError, match=sentence):
        ms_resampler.ask(**question | changes)


def test_another_kind_of_model_says_what_to_do(tmp_path):
    tiny_models.text_config("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a `qwen2` model, not one of this package: put one together with"):
        ms_resampler.ask(QUESTION, tiny_models.picture(), tmp_path)


def test_damaged_weights_are_named(folder, tmp_path):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    with pytest.raises(OSError, match="damaged or not complete"):
        load(tmp_path)
