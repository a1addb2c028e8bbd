"""Packed weights: the same answers, nothing lost, and a sentence where they cannot be used."""

import copy
import pickle
import weakref

import pytest
import torch
from tiny_models import IMAGE, LANGUAGE_MODELS, TOWERS, collate, pixels, tiny_model, words
from torch import nn

from ms_resampler import MSResamplerForConditionalGeneration
from ms_resampler.packing_ms_resampler import PackedLinear, pack_linears
from ms_resampler.projectors_ms_resampler import PROJECTORS, SCOPED_PROJECTORS

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        reason="not on this processor",
    ),
)


@torch.no_grad()
def difference(answer, expected):
    return ((answer - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (7,), (2, 33), (577,)])
def test_a_packed_layer_is_the_formula(rows, bias, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(130, 71, bias=bias)).to(dtype)
    x, weight = torch.randn(*rows, 130).to(dtype), model[0].weight.double()
    expected = x.double() @ weight.T + (model[0].bias.double() if bias else 0)
    pack_linears(model)
    assert type(model[0]) is PackedLinear
    assert model[0].to("cpu", dtype) is model[0]
    assert model(x).dtype == dtype
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol={torch.float32: 2e-6}.get(dtype, 2e-2))


@torch.no_grad()
def test_rows_need_not_lie_one_after_another():
    model = nn.Sequential(nn.Linear(40, 24))
    x = torch.randn(3, 5, 80)[..., ::2].transpose(0, 1)
    expected = model(x)
    pack_linears(model)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[:1].expand(4, 3, 40)), expected[:1].expand(4, 3, 24))


@torch.no_grad()
@pytest.mark.parametrize(
    "parts",
    [
        *({"projector": {"projector_type": projector}} for projector in PROJECTORS if projector != "mlp"),
        {"projector": {"projector_type": "mlp", "visual_tokens": [6, 6]}},
        *({"text": text} for text in LANGUAGE_MODELS),
        *({"tower": tower} for tower in TOWERS),
        *({"projector": {"projector_type": projector}} for projector in SCOPED_PROJECTORS),
        {"projector": {"projector_type": "ms_resampler_branches", "branch_form": {"fusion": "head"}}},
    ],
    ids=str,
)
def test_a_packed_model_says_the_same(parts):
    """Every projector, language model and tower; padded texts; what is generated, too."""
    model = tiny_model(**parts)
    images = model.get_image_features(pixels(2))
    placeholders = [IMAGE] * len(images.pooler_output[0])
    first, second = words(5, 9)
    batch = collate([[*placeholders, *first], [*placeholders, *second]]) | {"pixel_values": pixels(2)}
    logits = model(**batch).logits
    answer = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert model.pack_weights() is model
    assert not [name for name, part in model.named_modules() if type(part) is nn.Linear]
    seen = batch["attention_mask"].bool()
    assert difference(model(**batch).logits[seen], logits[seen]) < 2e-5
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), answer)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [BFLOAT16])
def test_a_packed_model_in_half_precision_is_as_near_to_the_whole_one(dtype):
    """To the float32 model, as the plain one is: rounding errors of the same size."""
    batch = {"input_ids": torch.tensor([[IMAGE] * 4 + words(9)[0]]), "pixel_values": pixels(1)}
    expected = tiny_model()(**batch).logits
    half = batch | {"pixel_values": batch["pixel_values"].to(dtype)}
    plain = difference(tiny_model().to(dtype)(**half).logits.float(), expected)
    packed = difference(tiny_model().to(dtype).pack_weights()(**half).logits.float(), expected)
    assert packed < 1.5 * plain


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_is_saved_as_it_was(tied, tmp_path):
    model = tiny_model(text_changes={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = {name: weakref.ref(part.weight) for name, part in model.named_modules() if type(part) is nn.Linear}
    numbers = model.num_parameters()
    model.pack_weights().pack_weights()  # a second time changes nothing
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.num_parameters() == numbers
    assert {name for name, weight in plain.items() if weight() is not None} == ({"lm_head"} if tied else set())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert not [part for part in loaded.modules() if isinstance(part, PackedLinear)]


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_packed_model_are_packed_and_apart(copied):
    model = tiny_model(text_changes={"tie_word_embeddings": True}, tie_word_embeddings=True).pack_weights()
    batch = {"input_ids": torch.tensor(words(9))}
    logits = model(**batch).logits
    other = copied(model)
    assert [type(part) for part in other.modules()] == [type(part) for part in model.modules()]
    assert [part.weight.is_mkldnn for part in other.modules() if isinstance(part, PackedLinear)] == [
        part.weight.is_mkldnn for part in model.modules() if isinstance(part, PackedLinear)
    ]
    assert other.lm_head.weight is other.get_input_embeddings().weight
    for tensor in model.parameters():
        tensor.zero_()
    assert torch.equal(other(**batch).logits, logits)


def test_what_packed_weights_cannot_do_is_refused():
    model = tiny_model().pack_weights()
    text = {"input_ids": torch.tensor(words(4))}
    assert model.to("cpu").float() is model
    with pytest.raises(ValueError, match=r"Packed weights cannot be trained: call under torch\.no_grad"):
        model(**text)
    with pytest.raises(ValueError, match=r"Packed weights stay on the CPU and torch\.float32: load the model again"):
        model.to(torch.bfloat16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}  # nothing was converted
    with pytest.raises(ValueError, match=r"Packed weights stay on the CPU"):
        tiny_model().pack_weights().to("meta")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@torch.no_grad()
def test_compiling_passes_packed_layers_by():
    model = nn.Sequential(nn.Linear(40, 24), nn.GELU())
    x = torch.randn(7, 40)
    expected = model(x)
    pack_linears(model)
    torch.testing.assert_close(torch.compile(model)(x), expected)


def test_a_layer_with_hooks_stays_as_it_is():
    model, seen = nn.Sequential(nn.Linear(8, 8)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    pack_linears(model)
    model(torch.zeros(1, 8))
    assert type(model[0]) is nn.Linear
    assert seen == [1]


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch):
    half = tiny_model().half()
    for model in (half, tiny_model().to("meta")):
        before = {name: type(part) for name, part in model.named_modules()}
        assert {name: type(part) for name, part in model.pack_weights().named_modules()} == before
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert type(tiny_model().to(torch.bfloat16).pack_weights().lm_head) is nn.Linear
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert type(tiny_model().pack_weights().lm_head) is nn.Linear
