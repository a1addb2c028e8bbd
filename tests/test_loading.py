"""Loading: in few bits, with a choice of attention, and what was saved after settings were changed."""

import logging
import warnings
from importlib.util import find_spec

import pytest
import tiny_models as tiny
import torch
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.projectors_ms_resampler import PROJECTORS, SCOPED_PROJECTORS

KINDS = [
    "ms_resampler",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*SCOPED_PROJECTORS, *PROJECTORS][1:]),
]
EXACT = {"atol": 0, "rtol": 0}
bits = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 numbers share a scale in four bits
WHOLE = "model.vision_tower.", "model.projector.", "lm_head."


def model_of(projector="ms_resampler", tower="clip_vision_model", **changes):
    fields = {"projector_type": projector, "visual_tokens": [6, 6] if projector == "mlp" else [3, 3]}
    fields |= {"query_grid": [3, 3]} | changes
    if tower == "convnext":
        fields["visual_tokens"] = [3, 3]
    return tiny.tiny_model(tower, "qwen2", text_changes=WIDE, projector=fields)


@torch.no_grad()
def answer(model):
    """Logits of a picture and some words."""
    tokens = len(model.get_image_features(tiny.pixels()).pooler_output[0])
    row = [7, *[tiny.IMAGE] * tokens, *tiny.words(6)[0]]
    return model(input_ids=torch.tensor([row]), pixel_values=tiny.pixels()).logits.float()


def distance(one, other):
    """One minus the mean cosine of two answers."""
    return 1 - cosine_similarity(one, other, dim=-1).mean().item()


def quantiser(width, **fields):
    return BitsAndBytesConfig(load_in_4bit=width == 4, load_in_8bit=width == 8, **fields)


@pytest.fixture(autouse=True)
def quiet_quantisers():
    """bitsandbytes imports what torch deprecates, and logs that it multiplies in float16 at every product."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


# --- In few bits


# The distances that docs/loading.md promises.
@bits
@pytest.mark.parametrize(("width", "nearby"), [(4, 0.05), (8, 0.002)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_answers_alike_in_few_bits(kind, width, nearby, tmp_path):
    model = model_of(kind)
    model.save_pretrained(tmp_path / "whole")
    expected = answer(MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16))
    quantised = MSResamplerForConditionalGeneration.from_pretrained(
        tmp_path / "whole", quantization_config=quantiser(width)
    )
    assert distance(answer(quantised), expected) < nearby
    for name, parameter in quantised.named_parameters():
        if name.startswith(WHOLE):
            assert parameter.dtype == torch.bfloat16, name
    inner = [p for name, p in quantised.named_parameters() if "layers" in name and "language" in name and p.ndim > 1]
    assert inner
    assert not any(p.is_floating_point() for p in inner)
    quantised.save_pretrained(tmp_path / "saved")
    again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert_close(answer(again), answer(quantised), **EXACT)


@bits
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("tower", ["convnext", "siglip2_vision_model"])
def test_towers_without_plain_layers_answer_in_few_bits(tower, width, tmp_path):
    model = model_of(tower=tower)
    model.save_pretrained(tmp_path)
    expected = answer(MSResamplerForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16))
    quantised = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quantiser(width).to_dict())
    assert distance(answer(quantised), expected) < 0.05
    base = AutoModel.from_pretrained(tmp_path, quantization_config=quantiser(width))
    assert all(p.is_floating_point() for part in (base.vision_tower, base.projector) for p in part.parameters())
    assert not base.language_model.layers[0].mlp.up_proj.weight.is_floating_point()


@bits
def test_modules_to_skip_may_be_named_by_a_part_of_their_path(tmp_path):
    model_of().save_pretrained(tmp_path)

    def load(*names):
        config = quantiser(8, llm_int8_skip_modules=list(names))
        model = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
        assert config.llm_int8_skip_modules == list(names)  # the caller's own is left alone
        matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
        return {name for name, p in matrices.items() if p.is_floating_point() and ".layers." in name}, set(matrices)

    for name in ("self_attn", "layers.0", "language_model.layers.0.mlp", "down_proj", "model.language_model.layers.1"):
        whole, names = load(name)
        inside = {path for path in names if f".{name}." in f".{path}." and "language" in path}
        assert {path for path in whole if "language" in path} == inside, name
    with pytest.warns(UserWarning, match=r"`quantization_config` skips `atention`, but the model has no such module"):
        load("atention")


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize(("width", "nearby"), [(4, 0.05), (8, 0.002)])
def test_torchao_answers_alike_in_few_bits(width, nearby, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    weights = {4: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), 8: Int8WeightOnlyConfig()}
    model_of().save_pretrained(tmp_path / "whole")
    expected = answer(MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16))
    quantised = MSResamplerForConditionalGeneration.from_pretrained(
        tmp_path / "whole", quantization_config=TorchAoConfig(weights[width])
    )
    assert distance(answer(quantised), expected) < nearby
    quantised.save_pretrained(tmp_path / "saved")
    again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert_close(answer(again), answer(quantised), **EXACT)


# --- A choice of attention

CHOICES = [
    "eager",
    "sdpa",
    {"text_config": "eager"},
    {"text_config": "sdpa", "vision_config": "eager"},
    {"": "eager", "projector_config": "eager"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(
    ("tower", "projector"),
    [
        ("convnext", "ms_resampler"),
        ("clip_vision_model", "q_former"),
        ("dinov2", "idefics2_perceiver"),
        ("siglip2_vision_model", "perceiver"),
    ],
)
def test_a_choice_of_attention_reaches_what_has_a_choice(tower, projector, choice, tmp_path):
    model = model_of(projector, tower)
    expected = answer(model)
    model.save_pretrained(tmp_path)
    chosen = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=choice)
    changed = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    changed.set_attn_implementation(choice)
    for other in (chosen, changed):
        wanted = {"text_config": choice, "vision_config": choice} if isinstance(choice, str) else choice
        config = other.config
        if "text_config" in wanted:
            assert config.text_config._attn_implementation == wanted["text_config"]
        inner = [part for part in other.model.projector.modules() if isinstance(part, PreTrainedModel)]
        for part in inner if isinstance(choice, str) else ():
            assert part.config._attn_implementation == choice
        if "vision_config" in wanted and tower != "convnext":  # which has no attention
            assert config.vision_config._attn_implementation == wanted["vision_config"]
        assert_close(answer(other), expected, atol=1e-4, rtol=1e-4)
    # As trainers load a reference model beside the one that they were given.
    reference = AutoModelForImageTextToText.from_pretrained(
        tmp_path, attn_implementation=chosen.config._attn_implementation
    )
    assert_close(answer(reference), expected, atol=1e-4, rtol=1e-4)


def test_a_choice_that_there_is_not_is_still_refused(tmp_path):
    model_of(tower="convnext").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='`attn_implementation="telepathy"` is not supported'):
        MSResamplerForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="telepathy")


# --- Settings that people change before they save


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pad_token_id", 0),
        ("bos_token_id", 1),
        ("eos_token_id", [2, 3]),
        ("decoder_start_token_id", 1),
        ("id2label", {0: "cat"}),
        ("problem_type", "regression"),
        ("output_hidden_states", True),
    ],
)
def test_settings_of_a_configuration_come_back(field, value, tmp_path):
    model = tiny.tiny_model()
    setattr(model.config, field, value)
    model.save_pretrained(tmp_path)
    loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    assert getattr(loaded.config, field) == value


@pytest.mark.parametrize("field", ["use_cache", "gradient_checkpointing"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_switches_of_a_configuration_do_not_stop_loading(field, part, tmp_path):
    model = tiny.tiny_model()
    setattr(model.config if part is None else getattr(model.config, part), field, False)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"config\.json holds")
        assert_close(answer(MSResamplerForConditionalGeneration.from_pretrained(tmp_path)), answer(model), **EXACT)


def test_a_setting_of_ones_own_comes_back_with_a_warning(tmp_path):
    model = tiny.tiny_model()
    model.config.note_of_mine = [1, "two"]
    model.save_pretrained(tmp_path / "one")
    with pytest.warns(UserWarning, match=r"config\.json holds `note_of_mine`, which MSResamplerConfig does not know"):
        loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    with pytest.warns(UserWarning, match="`note_of_mine`"):
        again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "two")
    assert again.config.note_of_mine == [1, "two"]
