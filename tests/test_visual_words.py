"""Visual tokens as mixtures of words: the formula, for every projector, and what the configuration refuses."""

import pytest
import tiny_models as tiny
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from ms_resampler.projectors_ms_resampler import PROJECTORS, SCOPED_PROJECTORS

WORDS = [7, 200, 31, 5, 90]


@pytest.mark.parametrize("kind", [*SCOPED_PROJECTORS, *PROJECTORS])
def test_a_visual_token_is_a_mixture_of_the_words(kind):
    tokens = [6, 6] if kind == "mlp" else 4
    model = tiny.tiny_model(projector={"projector_type": kind, "visual_tokens": tokens})
    model.config.visual_words = None
    plain = torch.stack(model.get_image_features(tiny.pixels(2)).pooler_output)
    model.config.visual_words = WORDS
    features = model.get_image_features(tiny.pixels(2))
    table = model.get_input_embeddings().weight
    for image, token in ((0, 0), (1, 1)):
        scores = [sum(plain[image, token] * table[word]) for word in WORDS]
        whole = sum(score.exp() for score in scores)
        shares = torch.stack([score.exp() / whole for score in scores])
        assert_close(features.word_weights[image][token], shares)
        mixture = sum(share * table[word] for share, word in zip(shares, WORDS, strict=True))
        assert_close(features.pooler_output[image][token], mixture)


def test_the_language_model_reads_the_mixtures():
    """A projector that says one word alone is to the language model that word, also where words are multiplied."""
    for llm in ("llama", "gemma"):
        model = tiny.tiny_model(text=llm)
        model.config.visual_words = WORDS
        table = model.get_input_embeddings().weight.detach()
        clear = 100 * torch.linalg.pinv(table[WORDS])[:, 2]  # seen by the third word alone
        model.model.projector.register_forward_hook(lambda _, __, out, y=clear: (y.expand_as(out[0]), None))
        ids = torch.tensor([[40, *[model.config.image_token_id] * 4, 9]])
        said = ids.masked_fill(ids == model.config.image_token_id, WORDS[2])
        with torch.no_grad():
            assert_close(model(ids, tiny.pixels(1)).logits, model(said).logits)


def test_only_the_projector_has_to_learn():
    model = tiny.tiny_model().train()
    model.config.visual_words = WORDS
    for part in (model.model.vision_tower, model.model.language_model):
        part.requires_grad_(False)
    weights = torch.stack(model.get_image_features(tiny.pixels(2)).word_weights)
    (-weights[..., 1].log().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.projector.parameters())
    assert model.get_input_embeddings().weight.grad is None


def test_words_are_saved_and_loaded(tmp_path):
    model = tiny.tiny_model()
    model.config.visual_words = WORDS
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.config.visual_words == WORDS
    shares, expected = (each.get_image_features(tiny.pixels(2)).word_weights for each in (loaded, model))
    assert_close(shares, expected)


@pytest.mark.parametrize(
    ("words", "why"),
    [([4], "two or more"), ([4, 4], "different"), ([4, 5, 320], "vocabulary of 320"), ([-1, 5], "vocabulary of 320")],
)
def test_words_that_cannot_be_mixed_are_refused(words, why):
    with pytest.raises(ValueError, match=why):
        type(tiny.tiny_model().config)(**tiny.tiny_model().config.to_dict() | {"visual_words": words})
