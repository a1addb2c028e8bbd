"""Loss and gradients, checkpointing, LoRA, resizing, precisions, saving and loading."""

import json

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from tiny_models import ragged_batch
from torch.testing import assert_close

from ms_resampler import MSResamplerForConditionalGeneration, MSResamplerModel
from ms_resampler.places_ms_resampler import GLOBAL

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EXACT = {"atol": 0, "rtol": 0}


def labelled_batch() -> dict[str, torch.Tensor]:
    """The ragged batch; words are labels, padding and image tokens are not."""
    batch = ragged_batch("right")
    ids = batch["input_ids"]
    hidden = (ids == tiny.IMAGE) | (batch["attention_mask"] == 0)
    return {**batch, "labels": ids.masked_fill(hidden, -100)}


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_weights(one, other) -> None:
    """Parameters and buffers, those that are not saved too."""
    for mine, theirs in ((one.named_parameters, other.named_parameters), (one.named_buffers, other.named_buffers)):
        mine, theirs = dict(mine()), dict(theirs())
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert_close(mine[name], theirs[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def assert_same_logits(one, other, **tolerance) -> None:
    """To the last digit but one: kernels round by where in memory a weight lies, and a file puts it anywhere."""
    batch = ragged_batch()
    assert_close(one(**batch).logits, other(**batch).logits, **tolerance or {"atol": 1e-6, "rtol": 1e-5})


# --- Loss and gradients


def test_loss_is_the_cross_entropy_of_the_next_words():
    model, batch = tiny.tiny_model(), labelled_batch()
    outputs = model(**batch)
    scores = outputs.logits.double().log_softmax(-1)
    by_hand = [
        -scores[row, place - 1, batch["labels"][row, place]]
        for row in range(len(scores))
        for place in range(1, scores.shape[1])
        if batch["labels"][row, place] != -100
    ]
    assert_close(outputs.loss.double(), torch.stack(by_hand).mean(), **CLOSE)


def test_accumulated_loss_is_divided_by_the_number_it_is_given():
    """What Trainer passes with gradient accumulation."""
    model, batch = tiny.tiny_model(), labelled_batch()
    count = int((batch["labels"][:, 1:] != -100).sum())
    assert_close(model(**batch, num_items_in_batch=2 * count).loss * 2, model(**batch).loss, **CLOSE)


def test_labels_and_logits_to_keep_do_not_change_the_loss_of_what_is_kept():
    model, batch = tiny.tiny_model(), labelled_batch()
    last = 5
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, -last:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, -last + 1 :].flatten(), ignore_index=-100)
    assert_close(model(**batch, labels=labels[:, -last:], logits_to_keep=last).loss, expected, **CLOSE)


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip2_vision_model", "dinov2", "convnext"])
def test_gradients_reach_tower_projector_and_language_model(tower):
    model = tiny.tiny_model(tower, vision_feature_layer=-1)
    got = gradients(model, labelled_batch())
    reached = {name for name, gradient in got.items() if gradient.abs().max() > 0}
    missing = {name for name, _ in model.named_parameters()} - reached
    # A bias of keys shifts all scores of a query alike, and towers end in parts that are not read.
    unread = ("k_proj.bias", "key.bias", "post_layernorm", "vision_tower.layernorm", "vision_tower.head", "mask_token")
    assert {name for name in missing if not any(part in name for part in unread)} == set()


def test_gradient_of_the_projector_is_the_slope_of_the_loss():
    model, batch = tiny.tiny_model().double(), labelled_batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    slope = gradients(model, batch)
    labels = batch.pop("labels")
    with torch.no_grad():
        for name in ("layers.0.prior.log_scale", "layers.0.score.0.weight", "input_proj.weight"):
            parameter, gradient = model.model.projector.get_parameter(name), slope[f"model.projector.{name}"]
            step = 1e-2 * gradient / gradient.norm()
            losses = []
            for sign in (1, -1):
                parameter.add_(sign * step)
                scores = model(**batch).logits[:, :-1].flatten(0, 1)  # in float64; model.loss is in float32
                losses.append(F.cross_entropy(scores, labels[:, 1:].flatten()))
                parameter.sub_(sign * step)
            assert_close((losses[0] - losses[1]) / 2, (gradient * step).sum(), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("changes", "reentrant"),
    [({}, True), ({}, False), ({"moving_scopes": True}, False), ({"projector_type": "ms_resampler_branches"}, False)],
    ids=str,
)
def test_gradient_checkpointing_of_all_parts_gives_the_same_gradients(changes, reentrant):
    model, batch = tiny.tiny_model(projector={"num_hidden_layers": 2} | changes).train(), labelled_batch()
    expected = gradients(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    parts = {
        name.split(".")[1] for name, part in model.named_modules() if getattr(part, "gradient_checkpointing", False)
    }
    assert parts == {"vision_tower", "projector", "language_model"}
    got = gradients(model, batch)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# --- LoRA


def lora(model) -> PeftModel:
    """Adapters in the language model alone; the projector is trained whole."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["projector"])
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_lora_of_the_language_model_with_a_whole_projector(tmp_path):
    adapted, batch = lora(tiny.tiny_model()), labelled_batch()
    assert_same_logits(adapted, tiny.tiny_model())
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {"lora_" if "lora_" in name else "projector" for name in trained} == {"lora_", "projector"}
    assert all("language_model" in name if "lora_" in name else "modules_to_save" in name for name in trained)

    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    adapted(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert (adapted(**batch).logits - tiny.tiny_model()(**batch).logits).abs().max() > 1e-3

    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.tiny_model(), tmp_path / "adapter").eval()
    assert_same_logits(again, adapted)
    merged = again.merge_and_unload()
    assert_same_logits(merged, adapted, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_logits(MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "merged"), merged)


# --- Vocabulary


@pytest.mark.parametrize("size", [tiny.VOCABULARY + 9, tiny.VOCABULARY - 9])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resized_embeddings_are_saved_and_loaded(tmp_path, tied, size):
    model = tiny.tiny_model(text_changes={"tie_word_embeddings": tied})
    before = model(**ragged_batch()).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.text_config.vocab_size == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(**labelled_batch())
    assert after.loss.isfinite()
    assert after.logits.shape[-1] == size
    assert_close(model(**ragged_batch()).logits[..., :300], before[..., :300], **CLOSE)
    model.save_pretrained(tmp_path)
    again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    assert again.get_input_embeddings().num_embeddings == size
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert_same_logits(again, model)


# --- Precisions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip2_vision_model", "dinov2", "convnext"])
@torch.no_grad()
def test_half_precision_is_near_single(tower, dtype):
    model = tiny.tiny_model(tower)
    expected = model(**ragged_batch()).logits.softmax(-1)
    got = model.to(dtype)(**ragged_batch()).logits
    assert got.dtype == dtype
    assert (got.float().softmax(-1) - expected).abs().max() < 0.05


@torch.no_grad()
def test_a_float32_projector_between_half_precision_parts():
    """Stage one in mixed precision: every part keeps its own dtype."""
    model = tiny.tiny_model()
    expected = model(**ragged_batch()).logits.softmax(-1)
    model.to(torch.bfloat16).model.projector.float()
    assert (model(**ragged_batch()).logits.float().softmax(-1) - expected).abs().max() < 0.05


def test_autocast_trains():
    model, batch = tiny.tiny_model(), labelled_batch()
    expected = gradients(model, batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
    for name in ("model.projector.layers.0.score.0.weight", "model.projector.output_proj.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.95


# --- Saving and loading


LOADINGS = {
    "plainly": {},
    "in low memory": {"low_cpu_mem_usage": True},
    "by device_map": {"device_map": "auto"},
    "on one device": {"device_map": {"": "cpu"}},
}


@pytest.mark.parametrize("options", LOADINGS.values(), ids=LOADINGS)
@pytest.mark.parametrize("text", ["qwen3", "gemma"])
def test_loaded_equals_saved_buffers_included(tmp_path, text, options):
    model = tiny.tiny_model(text=text)
    model.save_pretrained(tmp_path)
    again, info = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not again.training
    assert_same_weights(again, model)
    assert_same_logits(again, model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_shards(tmp_path, tied):
    model = tiny.tiny_model(text_changes={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    for options in ({}, {"device_map": "auto"}):
        again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, **options)
        assert_same_weights(again, model)


ON_DISK = [["vision_tower", "language_model"], ["vision_tower", "projector", "language_model"]]


@pytest.mark.parametrize("on_disk", ON_DISK, ids="-".join)
def test_weights_that_wait_on_disk(tmp_path, on_disk):
    """device_map may leave parts on disk; they are read when their turn comes."""
    model = tiny.tiny_model()
    model.save_pretrained(tmp_path / "model")
    parts = {f"model.{name}": "disk" if name in on_disk else "cpu" for name, _ in model.model.named_children()}
    again = MSResamplerForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=parts | {"lm_head": "cpu"}, offload_folder=tmp_path / "offload"
    )
    assert next(again.model.language_model.parameters()).device.type == "meta"
    assert_same_logits(again, model)
    text = {**ragged_batch(), "do_sample": False, "max_new_tokens": 3}
    assert_close(again.generate(**text), model.generate(**text))


@pytest.mark.parametrize("kind", ["ms_resampler", "ms_resampler_branches"])
def test_names_in_the_file(kind, tmp_path):
    """The contract with every checkpoint there is; a change belongs in UPGRADING.md."""
    model = tiny.tiny_model(projector={"projector_type": kind}, text_changes={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    parts = ["v_proj", "o_proj", "ffn_norm", "ffn.0", "ffn.2"]
    parts += ["score.0"] if kind == "ms_resampler" else ["query_norm", "q_proj", "k_proj"]
    own = {"patch_norm.weight", "patch_norm.bias", "layers.0.score.2.weight"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {".".join(name.split(".")[:2]) for name in names} == {
        "model.vision_tower",
        "model.projector",
        "model.language_model",
    }
    assert {name.removeprefix("model.projector.") for name in names if "projector" in name} == {
        *(f"{norm}.{leaf}" for norm in ("input_norm", "output_norm") for leaf in ("weight", "bias")),
        *(f"{part}.{leaf}" for part in ("input_proj", "patch_conv", "output_proj") for leaf in ("weight", "bias")),
        *(own if kind == "ms_resampler" else ("query", "layers.0.scope_embedding")),
        *(f"layers.0.prior.{name}" for name in ("sigma", "log_scale", "offset")),
        *(f"layers.0.{name}" for name in ("gate_norm.weight", "gate_norm.bias", "gate.weight")),
        *(f"layers.0.{part}.{leaf}" for part in parts for leaf in ("weight", "bias")),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, "auto"])
@torch.no_grad()
def test_loading_in_another_dtype(tmp_path, dtype):
    model = tiny.tiny_model()
    (model.to(torch.bfloat16) if dtype == "auto" else model).save_pretrained(tmp_path)
    again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert again.config.dtype == again.config.text_config.dtype == torch.bfloat16
    expected = dict(model.named_parameters())
    for name, value in again.named_parameters():
        assert_close(value, expected[name].to(torch.bfloat16), **EXACT)
    assert (again(**ragged_batch()).logits.float() - tiny.tiny_model()(**ragged_batch()).logits).abs().max() < 0.15


def test_the_base_model_loads_from_the_whole_ones_folder_and_back(tmp_path):
    model = tiny.tiny_model(text_changes={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "whole")
    base = MSResamplerModel.from_pretrained(tmp_path / "whole")
    assert_same_weights(base, model.model)
    base.save_pretrained(tmp_path / "base")
    whole = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "base")
    assert_same_logits(whole, model)


STATIC = {"projector_type": "ms_resampler_branches", "branch_form": {"fusion": "static"}, "num_attention_heads": 2}


@pytest.mark.parametrize("changes", [{}, STATIC])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "auto"}], ids=str)
def test_weights_that_are_missing_are_initialised(tmp_path, options, changes):
    """A LLaVA-like folder without our projector: it starts as documented, its sigmas as configured."""
    model = tiny.tiny_model(projector=changes)
    state = {name: value for name, value in model.state_dict().items() if ".projector." not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    again, info = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert info["missing_keys"] == {name for name in model.state_dict() if ".projector." in name}
    assert_initialised(again.model.projector)
    new = dict(again.model.language_model.named_parameters())
    for name, value in model.model.language_model.named_parameters():
        assert_close(new[name], value.to(new[name].dtype), **EXACT)


@torch.no_grad()
def assert_initialised(projector) -> None:
    """The table of init_resampler_weights, from the outside."""
    for name, part in projector.named_modules():
        if isinstance(part, torch.nn.LayerNorm):
            assert (part.weight == 1).all()
            assert (part.bias == 0).all()
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)):
            assert part.bias is None or (part.bias == 0).all()
            spread = 0.0 if name.endswith("gate") else part.weight[0].numel() ** -0.5
            assert_close(part.weight.float().std().item(), spread, rtol=0.25, atol=0)
    prior, sigmas = projector.layers[0].prior, projector.config.scope_sigmas
    assert (prior.log_scale == 0).all()
    opposite = torch.tensor([-1.0, 1.0])[:, None]  # the two heads of a scope: half as wide, on both sides of its centre
    if projector.config.projector_type == "ms_resampler_branches":
        assert_close(projector.query.float().std().item(), 0.02, rtol=0.4, atol=0)
        assert (projector.layers[0].scope_logits == 0).all()
        assert torch.equal(
            prior.sigma, torch.tensor([[sigma / 2 if sigma else GLOBAL] * 2 for sigma in sigmas]).to(prior.sigma)
        )
        shared = [(offset_h2, sigma or 0) for offset_h2, sigma in zip(prior.offset, sigmas, strict=True)]
    else:
        assert torch.equal(prior.sigma, torch.tensor([[0.25, 0.25, 1.5, GLOBAL]]).to(prior.sigma))
        shared = [(prior.offset[0, :2], 0.5), (prior.offset[0, 2:], 0)]
    for offset_h2, sigma in shared:
        assert_close(offset_h2.float(), opposite * offset_h2[1].float(), rtol=1e-2, atol=0)
        assert_close(offset_h2.norm(dim=-1).max().item(), 0.64 * sigma, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("gone", "spread"),
    {
        "query": 0.02,
        "layers.0.scope_embedding": 1,
        "layers.0.prior.log_scale": 0,
        "layers.0.gate.weight": 0,
        "layers.0.ffn.2.weight": 32**-0.5,
    }.items(),
)
def test_one_missing_weight_is_initialised_and_its_neighbours_are_kept(tmp_path, gone, spread):
    model = tiny.tiny_model(projector={"projector_type": "ms_resampler_branches"})
    gone = f"model.projector.{gone}"
    state = {name: value for name, value in model.state_dict().items() if name != gone}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    again, info = MSResamplerForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {gone}
    for name, value in again.state_dict().items():
        if name != gone:
            assert_close(value, state[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(again.get_parameter(gone).std().item(), float(spread), rtol=0.4, atol=0)


def test_a_new_model_starts_as_documented():
    assert_initialised(MSResamplerForConditionalGeneration(tiny.tiny_config()).model.projector)


def test_a_model_made_on_the_meta_device_and_loaded():
    """What FSDP, DeepSpeed and vLLM do."""
    model = tiny.tiny_model()
    with torch.device("meta"):
        empty = MSResamplerForConditionalGeneration(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.state_dict().keys() == model.state_dict().keys()
