"""Visual tokens as mixtures of words: the formula, for every projector, and what the configuration refuses."""

import pytest
import tiny_models as tiny
import torch
from torch.testing import assert_close

from ms_resampler.assembly import word_ids
from ms_resampler.conversion.from_ours import with_projector
from ms_resampler.conversion.to_llava import check_fits
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


@pytest.mark.parametrize(
    ("words", "why"),
    [([4], "two or more"), ([4, 4], "different"), ([4, 5, 320], "vocabulary of 320"), ([-1, 5], "vocabulary of 320")],
)
def test_words_that_cannot_be_mixed_are_refused(words, why):
    with pytest.raises(ValueError, match=why):
        type(tiny.tiny_model().config)(**tiny.tiny_model().config.to_dict() | {"visual_words": words})


class Dictionary:
    """A tokenizer of known words; others are spelled."""

    def __call__(self, text, add_special_tokens):
        known = {" cat": [5], " dog": [6], " Cat": [7]}
        return type("Encoding", (), {"input_ids": known.get(text, [8] * len(text))})


def test_words_are_the_tokens_within_a_sentence():
    assert word_ids(Dictionary(), ["dog", "cat"]) == [6, 5]
    with pytest.raises(ValueError, match="2 visual words are more than one token of the language model: otter, yak"):
        word_ids(Dictionary(), ["dog", "otter", "yak"])
    for words in (["dog"], ["dog", "dog"], []):
        with pytest.raises(ValueError, match="two or more different ones"):
            word_ids(Dictionary(), words)


def test_conversion_keeps_words_or_refuses_them():
    config = tiny.tiny_config(visual_words=WORDS)
    assert with_projector(config, {"projector_type": "avg_pool", "visual_tokens": 4}).visual_words == WORDS
    plain = tiny.tiny_config(projector={"projector_type": "mlp", "visual_tokens": [6, 6]}, visual_words=WORDS)
    with pytest.raises(ValueError, match="LLaVA has no visual tokens that are words"):
        check_fits(plain)
