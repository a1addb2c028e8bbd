"""The recipe words: a projector learns the words of captions, and everything else stays as it was."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import save_tiny, tiny_model, tiny_processor, tiny_tokenizer
from tiny_runs import run_interrupted
from torch.testing import assert_close

from ms_resampler import MSResamplerForConditionalGeneration, MSResamplerProcessor
from ms_resampler.training.recipes import RECIPES
from ms_resampler.training.run import train
from ms_resampler.training.words import SayingWords, WordsCollator

WORDS = "abcd"  # in a tokenizer of bytes, letters are words


def ids():
    return [tiny_tokenizer()(letter, add_special_tokens=False).input_ids[0] for letter in WORDS]


def record(name, answer, colour="white", images=1):
    turns = [{"from": "human", "value": "<image>" * images}, {"from": "gpt", "value": answer}]
    pictures = [Image.new("RGB", (24, 24), colour)] * images
    return {"id": name, "image": pictures[0] if images == 1 else pictures, "conversations": turns}


def test_the_words_of_the_answer_share_equally():
    collate = WordsCollator(tiny_processor(), ids())
    assert collate.encode(record("1", "B z a a"))["words"].tolist() == [[0.5, 0.5, 0, 0]]
    batch = collate.join([collate.encode(record("1", "c")), collate.encode(record("2", "d"))])
    assert batch["words"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert not collate.blank()["words"].any()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (record("7", "xyz"), "Record 7 has none of the visual words in its answers"),
        (record("8", "a", images=2), "Record 8 has 2 images; words are learned from one picture at a time"),
    ],
)
def test_records_that_teach_no_words_are_bad(bad, why):
    with pytest.raises(ValueError, match=why):
        WordsCollator(tiny_processor(), ids()).encode(bad)


def test_the_loss_is_that_of_the_mean_shares():
    model = tiny_model()
    model.config.visual_words = ids()
    pixels, words = torch.randn(2, 3, 24, 24), torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0.5]])
    first, second = model.get_image_features(pixels).word_weights
    expected = -(first.mean(0)[0].log() + 0.5 * second.mean(0)[1].log() + 0.5 * second.mean(0)[3].log()) / 2
    assert_close(SayingWords(model)(words, pixels)["loss"], expected)


@pytest.fixture
def start(tmp_path):
    """A model with visual words, and pictures of three colours, each with a letter."""
    save_tiny(tmp_path / "start", text="qwen2", visual_words=ids())
    rows = []
    for number in range(48):
        letter, colour = (("a", "red"), ("b", "lime"), ("c", "blue"))[number % 3]
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{number}.png")
        rows.append(record(str(number), f"it is {letter}") | {"image": f"{number}.png"})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def recipe():
    options = {"steps": 60, "batch_size": 12, "bf16": False, "workers": 0, "save_steps": 40, "logging_steps": 5}
    return dataclasses.replace(RECIPES["words"](), **options)


def places(folder, name="run"):
    return {"model": folder / "start", "data": folder / "data.json", "images": folder, "out": folder / name}


def run(folder, name="run"):
    return train(recipe(), **places(folder, name))


@pytest.mark.parametrize("tied", [False, True])
def test_a_projector_learns_the_words_and_nothing_else_changes(tmp_path, start, tied):
    if tied:
        model = tiny_model(text="qwen2", visual_words=ids(), text_changes={"tie_word_embeddings": True})
        model.save_pretrained(start / "start")
    result = run(start)
    before, after = (load_file(folder / "model.safetensors") for folder in (start / "start", result))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("prior.sigma"):  # as configured
            continue
        assert torch.equal(value, after[name]) != name.startswith("model.projector."), name
    model = MSResamplerForConditionalGeneration.from_pretrained(result)
    processor = MSResamplerProcessor.from_pretrained(result)
    pictures = [Image.new("RGB", (24, 24), colour) for colour in ("red", "lime", "blue")]
    weights = model.get_image_features(**processor(images=pictures, return_tensors="pt")).word_weights
    assert [weight.mean(0).argmax().item() for weight in weights] == [0, 1, 2]
    assert min(weight.mean(0).max().item() for weight in weights) > 0.4  # of four words
    assert json.loads((result / "training_record.json").read_text())["recipe"]["text"] == "words"


def test_a_killed_run_ends_as_one_that_ran_through(start, monkeypatch):
    whole = load_file(run(start, "whole") / "model.safetensors")
    run_interrupted(recipe(), places(start, "killed"), 50, monkeypatch)
    assert_close(load_file(start / "killed" / "model" / "model.safetensors"), whole, rtol=0, atol=0)


def test_a_model_without_words_is_refused(tmp_path, start):
    tiny_model(text="qwen2").save_pretrained(start / "start")
    with pytest.raises(ValueError, match="needs a model whose visual tokens are words"):
        run(start)
