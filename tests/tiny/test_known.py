"""What a checkpoint knows: features of its training pictures, the words of its questions, and thresholds."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from ms_resampler import TINY
from ms_resampler.folders import KNOWN
from ms_resampler.modeling_ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.tiny import known
from ms_resampler.tiny.stages import tiny_talk


def conversation(*questions):
    return {
        "conversations": [
            turn
            for question in questions
            for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": "sunflower"})
        ]
    }


def test_distance_is_the_mean_to_the_five_nearest_standardised(tmp_path):
    trained, other = torch.randn(40, 6) * 3 + 1, torch.randn(7, 6)
    known.fit_pictures(trained, tmp_path / KNOWN)
    mean, std = trained.numpy().mean(axis=0), trained.numpy().std(axis=0, ddof=1)
    away = np.linalg.norm(((other.numpy() - mean) / std)[:, None] - (trained.numpy() - mean) / std, axis=-1)
    nearest = np.sort(away, axis=-1)[:, :5].mean(axis=-1)
    np.testing.assert_allclose(known.distances(other, load_file(tmp_path / KNOWN)), nearest, rtol=5e-3)


def test_words_of_questions_are_known_and_those_of_answers_are_not():
    words = known.known_words([conversation("<image>\nRead the Digit.", "Where is a 7?"), conversation("Count!")])
    assert {"read", "digit", "where", "7", "count", "the"} <= words
    assert not {"image", "sunflower"} & words


@pytest.mark.parametrize(
    ("question", "unknown", "count"),
    [
        ("What is the capital of France?", ["capital", "France"], 6),
        ("Please, oh please. What colour is it? Merci!", [], 4),
        ("I should like to know: what colour is it?", [], 4),
        ("Where's the coloured one shown?", [], 5),
        ("Colour: ", [], 1),
        ("???", [], 0),
    ],
)
def test_unknown_words_are_those_of_the_longest_sentence(question, unknown, count):
    words = {"what", "is", "the", "of", "colour", "it", "where", "one", "show"}
    assert known.unknown_words(question, words) == (unknown, count)


def test_a_threshold_lets_its_share_pass():
    values = list(range(1, 101))
    assert known.quantile(values, 0.99) == 99
    assert known.quantile([0.0] * 99 + [1.0], 0.985) == 0


@pytest.mark.slow
def test_the_embedded_checkpoint_knows_its_scenes_and_no_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(known, "CONVERSATIONS", 100)
    model, processor = MSResamplerForConditionalGeneration.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    entry = known.known_inputs(model, processor, tiny_talk().dataset(800 * 32), tmp_path)
    flagged = {row["what"]: row["flagged"] for row in entry["measured"]}
    assert flagged["scenes of the test"] < 0.02
    assert flagged["cut-outs of photographs"] > 0.8
    assert flagged["held-out questions about scenes"] < 0.02
    assert flagged["questions of general knowledge"] > 0.8
    assert not any(known.shares(entry["questions"], entry["words"].split()))
    assert load_file(tmp_path / KNOWN)["features"].dtype == torch.float16
