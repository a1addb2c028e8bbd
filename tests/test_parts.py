"""Towers and language models of other builds: what they put out is read from them, and nothing is lost on the way."""

import pytest
import tiny_models as tiny
import torch
from components import save_llm
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, CLIPImageProcessorPil

from ms_resampler import MSResamplerConfig, MSResamplerForConditionalGeneration
from ms_resampler.assembly import init
from ms_resampler.towers_ms_resampler import TowerState, _read_state, read_tower

EXACT = {"atol": 0, "rtol": 0}
_VIT = tiny.TOWERS["vit"]
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2]}

# Fields; the state to read; then, written down from the papers: (height, width), width C, patch grid, prefix tokens.
TOWERS = {
    "swin": (_SWIN | {"window_size": 2}, -1, (32, 32), 32, (4, 4), 0),
    "swinv2": (_SWIN | {"window_size": 4}, -1, (32, 32), 32, (4, 4), 0),
    "hiera": (
        {
            "image_size": (64, 64), "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 4],
            "embed_dim_multiplier": 2.0, "masked_unit_size": [4, 4], "num_query_pool": 2, "mlp_ratio": 2.0,
        },
        -1, (64, 64), 32, (4, 4), 0,
    ),
    "resnet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        -1, (224, 224), 16, (28, 28), 0,
    ),
    "efficientnet": (
        {
            "image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
            "depth_divisor": 4,
        },
        -1, (64, 64), 320, (2, 2), 0,
    ),
    "mobilenet_v1": ({"image_size": 64, "depth_multiplier": 0.25}, -1, (64, 64), 256, (2, 2), 0),
    "mobilenet_v2": ({"image_size": 64, "depth_multiplier": 0.25}, -1, (64, 64), 1280, (2, 2), 0),
    "vitdet": (
        {
            "image_size": 24, "pretrain_image_size": 24, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "mlp_ratio": 2,
        },
        -2, (24, 24), 16, (6, 6), 0,
    ),
    "sam_vision_model": (
        {
            "image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "output_channels": 8, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 4,
        },
        -1, (32, 32), 8, (8, 8), 0,
    ),
    "internvl_vision": (_VIT | {"image_size": [24, 24], "patch_size": [4, 4]}, -2, (24, 24), 16, (6, 6), 1),
    "idefics3_vision": (_VIT, -2, (24, 24), 16, (6, 6), 0),
    "deit": (_VIT, -2, (24, 24), 16, (6, 6), 2),
    "vit": (_VIT | {"image_size": (16, 32), "patch_size": (4, 4)}, -2, (16, 32), 16, (4, 8), 1),
    "beit": (_VIT | {"image_size": (16, 32), "patch_size": (4, 8)}, -2, (16, 32), 16, (4, 4), 1),
}  # fmt: skip


def model_with(tower, layer, **text):
    """A tiny model around a tower, with two visual tokens."""
    torch.manual_seed(0)
    config = MSResamplerConfig(
        vision_config=tower,
        text_config=tiny.text_config(**text),
        projector_config={"hidden_size": 16, "num_attention_heads": 4, "visual_tokens": [1, 2]},
        image_token_id=tiny.IMAGE,
        vision_feature_layer=layer,
    )
    return tiny.loud(MSResamplerForConditionalGeneration(config)).eval()


def reaches_the_projector(model, images):
    seen = []
    hook = model.model.projector.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    model.get_image_features(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_a_towers_shape_is_read_from_the_tower(kind):
    fields, layer, size, width, grid, prefix = TOWERS[kind]
    tower = read_tower(AutoConfig.for_model(kind, **fields))
    assert (tower.image_size, tower.prefix_tokens) == (size, prefix)
    model = model_with(AutoConfig.for_model(kind, **fields), layer)
    assert (model.config.feature_width, model.config.native_patch_grid) == (width, grid)
    assert model.config.patch_grid(size) == grid
    features, patch_grid = reaches_the_projector(model, tiny.pixels(2, size))
    assert patch_grid == grid
    assert features.shape == (2, grid[0] * grid[1], width)


@pytest.mark.parametrize(
    ("size", "shape", "state"),
    [
        ((32, 80), (1, 8, 2, 5), TowerState(8, (2, 5), (16, 16), axis=1)),
        ((32, 80), (1, 2, 5, 8), TowerState(8, (2, 5), (16, 16), axis=3)),
        ((40, 80), (1, 8, 2, 5), TowerState(8, (2, 5), (16, 16), axis=1)),  # half a cell cut
        ((40, 80), (1, 8, 3, 5), TowerState(8, (3, 5), (16, 16), axis=1)),  # and padded to a whole one
        ((60, 84), (1, 8, 10, 14), TowerState(8, (10, 14), (6, 6), axis=1)),
        ((60, 42), (1, 16, 10, 7), TowerState(16, (10, 7), (6, 6), axis=1)),
    ],
)
def test_rows_and_columns_have_strides_of_their_own(size, shape, state):
    assert _read_state(shape, size, (4, 4)) == state


@pytest.mark.parametrize("kind", ["swin", "hiera", "resnet", "efficientnet", "mobilenet_v2", "vitdet"])
@torch.no_grad()
def test_patches_lie_in_raster_order(kind):
    """A picture whose lower right quarter changes: the patches far from it, at the upper left, hardly do."""
    fields, layer, size, *_ = TOWERS[kind]
    if kind in ("efficientnet", "mobilenet_v2"):  # whose patches see everything at the end
        layer = 2
    model = model_with(AutoConfig.for_model(kind, **fields), layer)
    images = tiny.pixels(1, size)
    changed = images.clone()
    changed[..., size[0] * 3 // 4 :, size[1] * 3 // 4 :] += 1
    (before, patch_grid), (after, _) = (reaches_the_projector(model, x) for x in (images, changed))
    difference = (before - after).abs().sum(-1)[0].unflatten(0, patch_grid)
    weight = difference / difference.sum()
    centre = [(weight.sum(1 - axis) * torch.arange(n)).sum() for axis, n in enumerate(patch_grid)]
    assert centre[0] > 0.6 * (patch_grid[0] - 1)
    assert centre[1] > 0.6 * (patch_grid[1] - 1)


@torch.no_grad()
def test_maps_of_several_sizes_are_joined_at_the_finest():
    kind, layers = "swin", [-1, 1]
    model = model_with(AutoConfig.for_model(kind, **TOWERS[kind][0]), layers)
    images = tiny.pixels(1, (32, 32))
    states = model.model.vision_tower(images, output_hidden_states=True).reshaped_hidden_states
    coarse, fine = (states[layer] for layer in layers)
    features, grid = reaches_the_projector(model, images)
    assert grid == tuple(fine.shape[-2:]) == (8, 8)
    assert coarse.shape[-2:] == (4, 4)
    repeated = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert_close(features, torch.cat([repeated, fine], dim=1).flatten(2).mT, **EXACT)


@pytest.mark.parametrize("kind", ["swin", "resnet", "efficientnet", "hiera", "internvl_vision"])
@torch.no_grad()
def test_models_around_these_towers_are_saved_and_loaded(kind, tmp_path):
    fields, layer, size, *_ = TOWERS[kind]
    model = model_with(AutoConfig.for_model(kind, **fields), layer)
    inputs = {"input_ids": torch.tensor([[7, *[tiny.IMAGE] * 2, 9]]), "pixel_values": tiny.pixels(1, size)}
    model.save_pretrained(tmp_path)
    loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(loaded(**inputs).logits, model(**inputs).logits, **EXACT)


@pytest.mark.parametrize(
    ("kind", "fields", "sentence"),
    [
        ("vit_mae", _VIT, "set `vision_prefix_tokens`"),
        (
            "yolos",
            _VIT | {"image_size": [24, 24], "num_detection_tokens": 40},
            "set `vision_prefix_tokens`",
        ),  # at the end, not in front
        ("pixtral", _VIT, "puts out no patches image by image"),
        ("llama", {}, "`llama` does not take images"),
        ("videomae", _VIT, "`videomae` does not take images"),
    ],
)
def test_towers_that_cannot_serve_are_refused_by_name(kind, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MSResamplerConfig(vision_config=AutoConfig.for_model(kind, **fields), vision_feature_layer=-1)


# Kinds with a bias in the head, and kinds that name their parts otherwise.
@pytest.mark.parametrize("kind", ["phi", "gptj", "gpt_neox", "gpt2", "opt"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_a_head_survives_saving_and_resizing_whole(kind, tied, tmp_path):
    model = tiny.tiny_model(text=kind, text_changes={"tie_word_embeddings": tied})
    inputs = {"input_ids": torch.tensor([[7, *[tiny.IMAGE] * 4, 9]]), "pixel_values": tiny.pixels()}
    expected = model(**inputs).logits
    assert (model.lm_head.bias is not None) == (kind in ("phi", "gptj"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    loaded = MSResamplerForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(loaded(**inputs).logits, expected, **EXACT)
    loaded.resize_token_embeddings(333)
    assert_close(loaded(**inputs).logits[..., : expected.shape[-1]], expected)
    loaded.save_pretrained(tmp_path / "resized")
    again = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "resized")
    assert_close(again(**inputs).logits, loaded(**inputs).logits, **EXACT)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "gpt_bigcode", "nanochat", "phimoe", "cohere2", "stablelm", "mpt"])
@torch.no_grad()
def test_language_models_without_a_line_of_their_own_say_the_same(kind):
    changes = {"lm_head_bias": True} if kind == "phimoe" else {"logit_scale": 0.5} if kind in ("mpt", "cohere2") else {}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2} if kind == "mpt" else tiny.LANGUAGE_MODELS["llama"]
    text = AutoConfig.for_model(kind, **{"vocab_size": tiny.VOCABULARY} | sizes | changes)
    config = MSResamplerConfig(vision_config=tiny.tower_config(), text_config=text, image_token_id=tiny.IMAGE)
    model = tiny.loud(MSResamplerForConditionalGeneration(config)).eval()
    alone = AutoModelForCausalLM.from_config(text).eval()
    alone.base_model.load_state_dict(model.model.language_model.state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.tensor(tiny.words(9))
    assert_close(model(input_ids=ids).logits, alone(ids).logits)


@pytest.mark.parametrize(
    ("tower", "llm"),
    [("swin", "phi"), ("resnet", "gpt2"), ("efficientnet", "opt"), ("beit", "gpt_neox"), ("internvl_vision", "gptj")],
)
def test_init_puts_them_together_by_its_defaults(tower, llm, tmp_path):
    fields, layer, size, _, grid, _ = TOWERS[tower]
    tiny.loud(AutoModel.from_config(AutoConfig.for_model(tower, **fields))).save_pretrained(tmp_path / "tower")
    side = dict(zip(("height", "width"), size, strict=True))
    CLIPImageProcessorPil(size={"shortest_edge": min(size)}, crop_size=side).save_pretrained(tmp_path / "tower")
    save_llm(tmp_path / "llm", kind=llm)
    projector = {"hidden_size": 16, "num_attention_heads": 4, "visual_tokens": 2}
    made = init(tmp_path / "tower", tmp_path / "llm", tmp_path / "model", projector=projector)
    assert made.model.config.vision_feature_layer == layer
    assert f"of {grid[0]} x {grid[1]} patches" in made.notes[-1]
    model = MSResamplerForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    content = [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert model.get_image_features(inputs["pixel_values"]).patch_grids == [grid]
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_family_that_does_more_after_its_head_is_refused(tmp_path, monkeypatch):
    """As a family of tomorrow may: gemma 2's cap, if this version knew nothing of it."""
    tiny.loud(AutoModel.from_config(tiny.tower_config())).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(tmp_path / "tower")
    save_llm(tmp_path / "llm", kind="gemma2")
    monkeypatch.setattr(MSResamplerConfig, "logit_cap", None)
    with pytest.raises(ValueError, match="`gemma2` makes its logits in a way that is not known here"):
        init(tmp_path / "tower", tmp_path / "llm", tmp_path / "model", projector={"visual_tokens": 4})
    assert not (tmp_path / "model").exists()
