"""The forward pass, against towers and language models alone: features, logits, padding, images, refusals."""

import copy
import pickle

import pytest
import tiny_models as tiny
import torch
from tiny_models import ragged_batch, ragged_rows
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ms_resampler import MSResamplerForConditionalGeneration, MSResamplerModel
from ms_resampler.projectors_ms_resampler import SCOPED_PROJECTORS, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights
from ms_resampler.towers_ms_resampler import flatten_patches

# What each tower puts in front of its patches, written down from the papers: CLS and registers.
PREFIX = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1 + 3,
    "dinov3_vit": 1 + 2,
    "vit": 1,
}
TRANSFORMER_TOWERS = list(PREFIX)
FEATURE_MAP_TOWERS = ["convnext", "convnextv2"]
EXACT = {"atol": 0, "rtol": 0}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLOSE_IN = {  # a few units in the last place
    torch.float64: {"atol": 1e-12, "rtol": 1e-12},
    torch.float32: CLOSE,
    torch.bfloat16: {"atol": 1.6e-2, "rtol": 1.6e-2},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
}


def projector_inputs(model, **images) -> list[torch.Tensor]:
    """The features that reach the projector, one tensor a call."""
    seen = []
    hook = model.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model.get_image_features(**images)
    hook.remove()
    return seen


def blocks_of(tower) -> torch.nn.ModuleList:
    return next(
        module
        for module in tower.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == tower.config.num_hidden_layers
    )


def block_outputs(tower, run) -> list[torch.Tensor]:
    """What the tower's embeddings and each of its blocks put out while `run` runs: hidden states 0, 1, ..."""
    blocks, seen = blocks_of(tower), []
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args, kw: seen.append(args[0]), with_kwargs=True)]
    hooks += [
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


# --- Towers


@pytest.mark.parametrize("layer", [-1, -2, 0, 2, [-2, -1], [1, 3]])
@pytest.mark.parametrize("kind", TRANSFORMER_TOWERS)
@torch.no_grad()
def test_projector_gets_the_patches_of_the_tower(kind, layer):
    model = tiny.tiny_base_model(kind, vision_feature_layer=layer)
    images = tiny.pixels(2)
    states = block_outputs(model.vision_tower, lambda: model.vision_tower(images))
    layers = [layer] if isinstance(layer, int) else layer
    by_hand = torch.cat([states[n][:, PREFIX[kind] :] for n in layers], dim=-1)
    (features,) = projector_inputs(model, pixel_values=images)
    assert features.shape == (2, 36, 16 * len(layers))
    assert_close(features, by_hand, **EXACT)


@pytest.mark.parametrize("kind", FEATURE_MAP_TOWERS)
@torch.no_grad()
def test_feature_maps_are_read_row_by_row(kind):
    model = tiny.tiny_base_model(kind)
    images = tiny.pixels(2, (16, 32))
    map_BCHW = model.vision_tower(images).last_hidden_state
    (features,) = projector_inputs(model, pixel_values=images)
    assert features.shape == (2, 2 * 4, 16)
    for row in range(2):
        for column in range(4):
            assert_close(features[:, 4 * row + column], map_BCHW[:, :, row, column], **EXACT)


@pytest.mark.parametrize("kind", [*TRANSFORMER_TOWERS, "siglip2_vision_model"])
@pytest.mark.parametrize("size", [(16, 16), (16, 32), (32, 24)])
@torch.no_grad()
def test_images_of_other_sizes_and_shapes_keep_raster_order(kind, size):
    """A change in one patch of pixels changes the embedding (layer 0) of one patch, in raster order."""
    model = tiny.tiny_base_model(kind, vision_feature_layer=0)
    rows, columns = size[0] // 4, size[1] // 4
    images = tiny.pixels(1, size)
    changed = images.clone()
    changed[:, :, 4 * 2 : 4 * 3, 4 * 1 : 4 * 2] += 1  # patch row 2, patch column 1
    (before,), (after,) = (projector_inputs(model, pixel_values=x) for x in (images, changed))
    assert before.shape[1] == rows * columns
    different = (before != after).any(-1)[0].nonzero().flatten()
    assert different.tolist() == [2 * columns + 1]


@pytest.mark.parametrize("dtype", CLOSE_IN, ids=str)
@pytest.mark.parametrize("kind", [*tiny.TOWERS])
@torch.no_grad()
def test_images_alone_equal_images_in_a_batch(kind, dtype):
    model = tiny.tiny_base_model(kind).to(dtype)
    images = tiny.pixels(3, (16, 32)).to(dtype)
    grids = torch.tensor([[1, 2], [2, 2], [1, 2]])
    together = model.get_image_features(images, token_grids=grids, output_scopes=True)
    assert together.token_grids == [(1, 2), (2, 2), (1, 2)]
    for n in range(3):
        alone = model.get_image_features(images[n : n + 1], token_grids=grids[n : n + 1], output_scopes=True)
        assert_close(together.pooler_output[n], alone.pooler_output[0], **CLOSE_IN[dtype])
        assert_close(together.scope_weights[n], alone.scope_weights[0], **CLOSE_IN[dtype])
        assert_close(together.scope_attentions[n], alone.scope_attentions[0], **CLOSE_IN[dtype])


@torch.no_grad()
def test_siglip2_takes_images_and_patches_of_images_alike():
    """Its own image processor's patches of an image that needs no resizing, and the image itself."""
    model, processor = tiny.tiny_base_model("siglip2_vision_model"), tiny.tiny_processor("siglip2_vision_model")
    image = tiny.picture(size=(24, 24))
    patched = processor.image_processor(image, return_tensors="pt")
    pixels = torch.tensor(tiny.np_pixels(image)) / 127.5 - 1
    flat = flatten_patches(pixels[None], 4)
    assert_close(flat["pixel_values"], patched["pixel_values"], **CLOSE)
    assert_close(flat["pixel_attention_mask"], patched["pixel_attention_mask"].to(torch.int32))
    assert flat["spatial_shapes"].tolist() == patched["spatial_shapes"].tolist() == [[6, 6]]
    from_patches = model.get_image_features(**patched).pooler_output[0]
    assert_close(model.get_image_features(pixels[None]).pooler_output[0], from_patches, **CLOSE)


@torch.no_grad()
def test_siglip2_grids_in_one_batch_equal_one_at_a_time():
    model, processor = tiny.tiny_base_model("siglip2_vision_model"), tiny.tiny_processor("siglip2_vision_model")
    pictures = [tiny.picture(n, size) for n, size in enumerate([(24, 24), (60, 20), (10, 40)])]
    batch = processor.image_processor(pictures, return_tensors="pt")
    shapes = [tuple(shape) for shape in batch["spatial_shapes"].tolist()]
    assert len(set(shapes)) == 3
    padded = model.get_image_features(**batch)
    assert padded.patch_grids == shapes
    states = block_outputs(model.vision_tower, lambda: model.vision_tower(**batch))[-2]
    for n, (rows, columns) in enumerate(shapes):
        alone = {
            "pixel_values": batch["pixel_values"][n : n + 1, : rows * columns],
            "pixel_attention_mask": batch["pixel_attention_mask"][n : n + 1, : rows * columns],
            "spatial_shapes": batch["spatial_shapes"][n : n + 1],
        }
        (features,) = projector_inputs(model, **alone)
        assert_close(features[0], states[n, : rows * columns], **CLOSE)
        assert_close(padded.pooler_output[n], model.get_image_features(**alone).pooler_output[0], **CLOSE)


@torch.no_grad()
def test_only_the_layers_that_are_read_are_kept():
    model = tiny.tiny_base_model(vision_feature_layer=[1, -1])
    kept = [state is not None for state in model.get_image_features(tiny.pixels()).hidden_states]
    assert kept == [False, True, False, True]
    everything = model.get_image_features(tiny.pixels(), output_hidden_states=True).hidden_states
    assert all(state is not None for state in everything)


def norms_run(model, **options) -> list[bool]:
    """Whether each block of the tower computed anything while images were encoded."""
    ran = [False] * len(blocks_of(model.vision_tower))
    hooks = []
    for n, block in enumerate(blocks_of(model.vision_tower)):
        norm = next(module for module in block.modules() if isinstance(module, torch.nn.LayerNorm))
        hooks.append(norm.register_forward_hook(lambda *_, n=n: ran.__setitem__(n, True)))
    model.get_image_features(tiny.pixels(), **options)
    for hook in hooks:
        hook.remove()
    return ran


@pytest.mark.parametrize(("layer", "read"), [(-2, 2), (0, 0), ([1, -3], 1), (-1, 3)])
@pytest.mark.parametrize("kind", [*TRANSFORMER_TOWERS, "siglip2_vision_model"])
@torch.no_grad()
def test_unread_layers_do_not_run_unless_asked_for(kind, layer, read):
    model = tiny.tiny_base_model(kind, vision_feature_layer=layer)
    assert norms_run(model) == [n < read for n in range(3)]
    assert norms_run(model, output_hidden_states=True) == [True] * 3
    assert norms_run(model, output_hidden_states=[*model.config.feature_layers, -1]) == [True] * 3


@pytest.mark.parametrize("training", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*TRANSFORMER_TOWERS, "siglip2_vision_model"])
def test_the_tower_cut_short_equals_the_whole_tower_to_the_bit(kind, dtype, training):
    model = tiny.tiny_base_model(kind, vision_feature_layer=[1, -2]).to(dtype).train(training)
    model.activation_checkpointing_enable()  # at work in training only
    images = tiny.pixels(2).to(dtype)
    weights = [*model.vision_tower.named_parameters(), *model.projector.named_parameters()]
    runs = []
    for options in ({}, {"output_hidden_states": True}):
        model.zero_grad()
        torch.manual_seed(0)  # dinov3 draws scales of its positions in training
        features = model.get_image_features(images, **options)
        tokens = torch.stack(features.pooler_output)
        tokens.float().square().sum().backward()
        results = {"tokens": tokens, "last": features.last_hidden_state}
        runs.append(results | {name: weight.grad for name, weight in weights if weight.grad is not None})
        assert_close(features.last_hidden_state, features.hidden_states[model.config.feature_layers[-1]], **EXACT)
    short, whole = runs
    assert len(short) > 20
    assert_close(short, whole, **EXACT)


def test_the_whole_tower_is_saved_loaded_copied_and_pickled(tmp_path):
    model = tiny.tiny_base_model()
    images = tiny.pixels()
    expected = model.vision_tower(images).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded, report = MSResamplerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert norms_run(other) == [True, True, False]
        assert_close(other.vision_tower(images).last_hidden_state, expected, **EXACT)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in blocks_of(other.vision_tower)[-1].parameters():
            weight.zero_()  # the copy's own layer, not the original's
    assert_close(model.vision_tower(images).last_hidden_state, expected, **EXACT)
    assert (other.vision_tower(images).last_hidden_state != expected).any()


# --- Language models


def twin(model) -> torch.nn.Module:
    """The language model as transformers builds it with its head, with our weights."""
    other = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    other.base_model.load_state_dict(model.model.language_model.state_dict())
    other.lm_head.load_state_dict(model.lm_head.state_dict())
    return other


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", list(tiny.LANGUAGE_MODELS))
@torch.no_grad()
def test_text_alone_is_the_language_model_alone(kind, tied):
    model = tiny.tiny_model(text=kind, text_changes={"tie_word_embeddings": tied})
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    text = tiny.collate(tiny.words(9, 5))
    real = text["attention_mask"].bool()
    assert_close(model(**text).logits[real], twin(model)(**text).logits[real], **CLOSE)


@pytest.mark.parametrize("kind", list(tiny.LANGUAGE_MODELS))
@torch.no_grad()
def test_visual_tokens_enter_the_language_model_unscaled(kind):
    """Gemma multiplies the embeddings of words in its table, so never those of images; granite multiplies both."""
    model = tiny.tiny_model(text=kind)
    row = [7, *[tiny.IMAGE] * 4, 9, 8]
    features = model.get_image_features(tiny.pixels()).pooler_output[0]
    embedded = model.get_input_embeddings()(torch.tensor([row]))
    embedded[0, 1:5] = features
    expected = twin(model)(inputs_embeds=embedded).logits
    assert_close(model(input_ids=torch.tensor([row]), pixel_values=tiny.pixels()).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2", "gemma3_text", "hyperclovax", "falcon_h1"])
@torch.no_grad()
def test_what_a_family_does_to_its_logits_is_more_than_the_head(kind):
    """The tests above would see it if the family's scaling or capping were forgotten."""
    model = tiny.tiny_model(text=kind)
    ids = torch.tensor(tiny.words(6))
    plain = model.lm_head(model.model(input_ids=ids).last_hidden_state)
    assert (model(input_ids=ids).logits - plain).abs().max() > 0.1


FLEX = pytest.param(
    "flex_attention", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
)


@pytest.mark.parametrize("attention", ["eager", "sdpa", FLEX])
@torch.no_grad()
def test_every_attention_implementation_gives_the_same_logits(attention):
    model = tiny.tiny_model()
    inputs = ragged_batch()
    expected = model(**inputs).logits
    model.model.language_model.set_attn_implementation(attention)
    assert model.config.text_config._attn_implementation == attention
    real = inputs["attention_mask"].bool()
    assert_close(model(**inputs).logits[real], expected[real], atol=1e-4, rtol=1e-4)


# --- Texts and images together


def model_and_batch(dtype: torch.dtype) -> tuple[MSResamplerForConditionalGeneration, dict[str, torch.Tensor]]:
    batch = ragged_batch()
    return tiny.tiny_model().to(dtype), batch | {"pixel_values": batch["pixel_values"].to(dtype)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_prompts_in_a_batch_equal_prompts_alone(side, text):
    model = tiny.tiny_model(text=text)
    rows, images, grids, owned = ragged_rows()
    batch = ragged_batch(side)
    logits = model(**batch).logits
    for n, (row, own) in enumerate(zip(rows, owned, strict=True)):
        alone = {"input_ids": torch.tensor([row])}
        if images[own].numel():
            alone |= {"pixel_values": images[own], "token_grids": grids[own]}
        assert_close(logits[n][batch["attention_mask"][n].bool()], model(**alone).logits[0], **CLOSE)


@torch.no_grad()
def test_visual_tokens_replace_the_placeholders_in_order():
    model = tiny.tiny_model()
    batch = ragged_batch()
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    outputs = model(**batch)
    hook.remove()
    places = batch["input_ids"] == tiny.IMAGE
    images = model.get_image_features(batch["pixel_values"], token_grids=batch["token_grids"])
    tokens = torch.cat(images.pooler_output)
    assert_close(seen[0][places], tokens, **CLOSE)
    assert_close(seen[0][~places], model.get_input_embeddings()(batch["input_ids"])[~places], **EXACT)
    assert_close(outputs.image_hidden_states, tokens, **CLOSE)


@pytest.mark.parametrize("dtype", CLOSE_IN, ids=str)
@torch.no_grad()
def test_images_encoded_before_equal_images_encoded_inside(dtype):
    model, batch = model_and_batch(dtype)
    inside = model(**batch).logits
    images = model.get_image_features(batch.pop("pixel_values"), token_grids=batch.pop("token_grids"))
    assert_close(model(**batch, mm_encoder_outputs={"image": images}).logits, inside, **CLOSE_IN[dtype])


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    model = tiny.tiny_model(text="gemma")  # whose table multiplies what it returns
    batch = ragged_batch()
    expected = model(**batch).logits
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert_close(model(inputs_embeds=embeds, **batch).logits, expected, **CLOSE)


@pytest.mark.parametrize("dtype", CLOSE_IN, ids=str)
@torch.no_grad()
def test_logits_to_keep(dtype):
    model, batch = model_and_batch(dtype)
    logits = model(**batch).logits
    assert_close(model(**batch, logits_to_keep=1).logits, logits[:, -1:], **CLOSE_IN[dtype])
    places = torch.tensor([3, 11])
    assert_close(model(**batch, logits_to_keep=places).logits, logits[:, places], **CLOSE_IN[dtype])


@pytest.mark.parametrize("split", [1, 6, 12])
@torch.no_grad()
def test_a_prompt_in_two_parts_with_a_cache_equals_the_whole(split):
    model = tiny.tiny_model()
    rows, images, grids, _ = ragged_rows()
    row = torch.tensor([rows[3]])  # five words, four visual tokens, eight words
    before = int((row[0, :split] == tiny.IMAGE).sum())
    tokens = model.get_image_features(images[4:], token_grids=grids[4:]).pooler_output[0]
    whole = model(input_ids=row, pixel_values=images[4:], token_grids=grids[4:]).logits
    parts, cache = [], DynamicCache(config=model.config.text_config)
    for ids, part in ((row[:, :split], tokens[:before]), (row[:, split:], tokens[before:])):
        features = {"image": type("Features", (), {"pooler_output": [part]})} if len(part) else None
        outputs = model(input_ids=ids, mm_encoder_outputs=features, use_cache=True, **{tiny.CACHE: cache})
        parts.append(outputs.logits)
    assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@torch.no_grad()
def test_outputs_on_request():
    model = tiny.tiny_model()
    model.set_attn_implementation("eager")
    batch = ragged_batch()
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 3
    assert len(outputs.attentions) == 2
    as_tuple = model(**batch, return_dict=False)
    assert_close(as_tuple[0], outputs.logits, **CLOSE)
    base = model.model(**batch, return_dict=False)
    assert_close(base[0], outputs.hidden_states[-1], **CLOSE)
    features = model.get_image_features(tiny.pixels(), return_dict=False)
    assert isinstance(features, tuple)


@torch.no_grad()
def test_scope_maps_sum_to_one_and_come_only_when_asked_for():
    model = tiny.tiny_model()
    assert model.get_image_features(tiny.pixels()).scope_weights is None
    features = model.get_image_features(tiny.pixels(2), output_scopes=True)
    for weights, maps in zip(features.scope_weights, features.scope_attentions, strict=True):
        assert weights.shape == (3, 4)
        assert maps.shape == (3, 4, 36)
        assert_close(weights.sum(0), torch.ones(4))
        assert_close(maps.sum(-1), torch.ones(3, 4))


# --- Refusals


def test_counts_that_differ_are_refused_with_both_counts():
    model = tiny.tiny_model()
    ids = torch.tensor([[7, *[tiny.IMAGE] * 5, 9]])
    with pytest.raises(ValueError, match=r"5 image tokens.*4 visual tokens"):
        model(input_ids=ids, pixel_values=tiny.pixels())
    with pytest.raises(ValueError, match=r"5 image tokens.*4 visual tokens"):
        model(inputs_embeds=model.get_input_embeddings()(ids), pixel_values=tiny.pixels())
    with pytest.raises(ValueError, match=r"5 image tokens.*8 visual tokens"):
        model.generate(input_ids=ids, pixel_values=tiny.pixels(2), max_new_tokens=1)


@torch.no_grad()
def test_image_tokens_without_images_are_words():
    """As in LLaVA: texts are scored by themselves, too."""
    model = tiny.tiny_model()
    ids = torch.tensor([[7, *[tiny.IMAGE] * 4, 9]])
    assert_close(model(input_ids=ids).logits, twin(model)(ids).logits, **CLOSE)


@pytest.mark.parametrize("text", ["qwen3", "phi"])
def test_image_tokens_count_in_no_loss_whoever_made_the_labels(text):
    model, batch = tiny.tiny_model(text=text), ragged_batch()
    theirs = batch["input_ids"].clone()  # as a collator makes them that knows of padding alone
    theirs[batch["attention_mask"] == 0] = -100
    kept = theirs.clone()
    ours = theirs.where(batch["input_ids"] != tiny.IMAGE, -100)
    logits = model(**batch).logits[:, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ours[:, 1:].flatten(), ignore_index=-100)
    assert_close(model(**batch, labels=theirs).loss, by_hand, **CLOSE)
    shifted = torch.nn.functional.pad(theirs[:, 1:], (0, 1), value=-100)
    assert_close(model(**batch, labels=theirs, shift_labels=shifted).loss, by_hand, **CLOSE)
    assert torch.equal(theirs, kept)


def test_an_image_token_that_the_model_says_itself_is_a_word():
    """After the prompt nothing is counted: a model that happens to say `<image>` goes on."""
    model = tiny.tiny_model()
    cache = model(input_ids=torch.tensor([[7, 9]]), use_cache=True)[tiny.CACHE]
    assert model(input_ids=torch.tensor([[tiny.IMAGE]]), **{tiny.CACHE: cache}).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "electra", "xlm"])
def test_language_models_of_another_build_are_refused_by_name(kind):
    text = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    config = tiny.tiny_config()
    config.text_config = text
    with pytest.raises(ValueError, match=rf"`{kind}` is not a decoder with a stack of layers"):
        MSResamplerForConditionalGeneration(config)


def test_images_twice_are_refused():
    model = tiny.tiny_model()
    ids = torch.tensor([[7, *[tiny.IMAGE] * 4, 9]])
    images = {"image": model.get_image_features(tiny.pixels())}
    with pytest.raises(ValueError, match="not as both"):
        model(input_ids=ids, pixel_values=tiny.pixels(), mm_encoder_outputs=images)


def test_ids_and_embeddings_are_given_one_of_the_two():
    model = tiny.tiny_model()
    ids = torch.tensor([[7, 8]])
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one"):
        model(pixel_values=tiny.pixels())


def test_a_wrong_number_of_token_grids_is_refused_with_both_counts():
    model = tiny.tiny_model()
    with pytest.raises(ValueError, match=r"3 token grids.*2 images"):
        model.get_image_features(tiny.pixels(2), token_grids=torch.tensor([[1, 1]] * 3))


def test_prefix_tokens_that_do_not_fit_the_tower_are_refused():
    model = tiny.tiny_model(vision_prefix_tokens=0)
    with pytest.raises(ValueError, match=r"37 patch features for a grid of 6 x 6"):
        model.get_image_features(tiny.pixels())


def test_image_sizes_that_are_no_multiple_of_the_patch():
    """The tower drops the remainder, and so does the grid."""
    model = tiny.tiny_base_model()
    assert model.get_image_features(tiny.pixels(1, (27, 33))).patch_grids == [(6, 8)]


@pytest.mark.parametrize("kind", sorted(tiny.LANGUAGE_MODELS))
def test_a_model_comes_back_whole_buffers_included(kind, tmp_path):
    changes = {"ssm_multipliers": [1.5, 2.0, 3.0, 4.0, 5.0]} if kind == "falcon_h1" else None
    model = tiny.tiny_model(text=kind, text_changes=changes)
    model.save_pretrained(tmp_path)
    loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(loaded, tensors)()), dict(getattr(model, tensors)())
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pooled_mlp": True},
        {"projector_type": "resampler"},
        {"projector_type": "ms_resampler_branches", "branch_form": {"fusion": "static"}},
    ],
)
def test_the_projector_of_a_new_model_starts_as_one_alone(changes):
    """transformers passes over modules whose weights are all in their parts."""
    torch.manual_seed(0)
    model = MSResamplerModel(tiny.tiny_config(projector={"hidden_size": 64, **changes}))
    C, T = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
    alone = SCOPED_PROJECTORS[changes.get("projector_type", "ms_resampler")](model.config.projector_config, C, T)
    alone = alone.apply(init_resampler_weights).apply(init_projector_weights).state_dict()
    assert model.projector.state_dict().keys() == alone.keys()
    for name, value in model.projector.state_dict().items():
        if value.unique().numel() == 1 or alone[name].unique().numel() == 1 or "prior" in name:
            assert torch.equal(value, alone[name]), name
        else:
            assert_close(value.std(), alone[name].std(), rtol=0.5, atol=0, msg=name)
    assert "layers.0.gate.weight" not in alone or not alone["layers.0.gate.weight"].any()


@pytest.mark.parametrize(("projector", "name"), [("ms_resampler", "MultiScopeResampler"), ("mlp", "MLPProjector")])
def test_units_of_sharding_are_those_of_the_parts_that_are_there(projector, name):
    fields = {"projector_type": projector, "visual_tokens": 36 if projector == "mlp" else 4}
    model = tiny.tiny_model(projector=fields)
    units = {"CLIPEncoderLayer", "CLIPVisionEmbeddings", "Qwen3DecoderLayer", name}
    assert model._no_split_modules == model.model._no_split_modules == sorted(units)


def test_the_class_has_what_transformers_asks_of_it():
    model = tiny.tiny_model()
    assert isinstance(model, MSResamplerForConditionalGeneration)
    assert model.can_generate()
    assert model.base_model is model.model
    assert model.get_decoder() is model.model.language_model
    assert model.get_encoder(modality="image") is model.model.vision_tower
    assert set(model.input_modalities) == {"image", "text"}
