"""The configuration: the geometry of patches and tokens, and a sentence for everything that cannot be."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, PvtConfig

from ms_resampler import MSResamplerConfig, MSResamplerProjectorConfig
from ms_resampler.configuration_ms_resampler import AUTO_MAP, token_grid


@pytest.mark.parametrize(
    ("budget", "patches", "grid"),
    [
        (36, (24, 24), (6, 6)),
        (8, (24, 24), (2, 4)),
        (8, (12, 24), (2, 4)),
        (8, (24, 12), (4, 2)),
        (144, (24, 24), (12, 12)),
        (20, (24, 24), (4, 5)),
        (40, (24, 24), (5, 8)),
        (45, (24, 24), (5, 9)),
        (6, (1, 12), (1, 6)),
        ((3, 5), (24, 24), (3, 5)),
        ([3, 5], (24, 24), (3, 5)),
        (None, (7, 9), (7, 9)),
        (1, (24, 24), (1, 1)),
    ],
)
def test_budgets_before_and_after(budget, patches, grid):
    assert token_grid(budget, patches) == grid


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 900))
def test_a_budget_is_met_exactly_in_the_images_proportions(rows, columns, budget):
    try:
        grid = token_grid(budget, (rows, columns))
    except ValueError as error:
        assert str(budget) in str(error)  # noqa: PT017 (both outcomes are right)
        return
    assert grid[0] * grid[1] == budget <= rows * columns
    assert (grid[1] / grid[0]) / (columns / rows) * (1 + 1e-9) >= 1 / 2
    assert (grid[1] / grid[0]) / (columns / rows) <= 2 * (1 + 1e-9)


@given(st.integers(1, 30), st.integers(1, 900))
def test_square_images_get_wide_grids_and_squares_where_they_can(side, budget):
    try:
        rows, columns = token_grid(budget, (side, side))
    except ValueError:
        return
    assert rows <= columns
    assert (rows == columns) == (math.isqrt(budget) ** 2 == budget)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 900))
def test_turning_the_image_turns_the_grid(rows, columns, budget):
    try:
        grid = token_grid(budget, (rows, columns))
        turned = token_grid(budget, (columns, rows))
    except ValueError:
        with pytest.raises(ValueError, match=str(budget)):
            token_grid(budget, (columns, rows))
        return
    if turned != grid[::-1]:  # two grids are equally near, and the wider one is taken both times
        assert grid[1] * turned[0] * rows**2 == grid[0] * turned[1] * columns**2
        assert grid[1] >= turned[0]
        assert turned[1] >= grid[0]


@given(st.integers(1, 24), st.integers(1, 24))
def test_every_patch_may_have_its_token(rows, columns):
    assert token_grid(rows * columns, (rows, columns)) == (rows, columns)


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        (577, "A budget of 577 visual tokens is impossible for 24 x 24 = 576 patches; use 1 to 576 tokens"),
        (0, "A budget of 0 visual tokens is impossible"),
        (37, "37 visual tokens cannot be laid out as a grid over 24 x 24 patches; use a count such as 35, 36, 40"),
        ((2, 0), r"two positive integers, got \(2, 0\)"),
        ((2, 3, 4), "two positive integers"),
        ((30, 30), "A budget of 900 visual tokens is impossible"),
        (True, "Visual tokens are a count or a grid .* got True"),
        (np.True_, "Visual tokens are a count or a grid"),
        ([2, True], "two positive integers"),
        (36.0, "Visual tokens are a count or a grid .* got 36.0"),
        ("36", "Visual tokens are a count or a grid"),
    ],
)
def test_impossible_budgets(budget, sentence):
    with pytest.raises(ValueError, match=sentence):
        token_grid(budget, (24, 24))


@pytest.mark.parametrize(
    ("budget", "plain"),
    [(np.int64(36), 36), (np.uint8(36), 36), (np.array([3, 5]), [3, 5]), ((np.int32(3), 5), (3, 5)), (np.array(8), 8)],
)
def test_numbers_of_numpy_are_numbers(budget, plain, tmp_path):
    assert token_grid(budget, (24, 24)) == token_grid(plain, (24, 24))
    config = MSResamplerProjectorConfig(
        visual_tokens=budget, hidden_size=np.int64(64), scope_sigmas=np.array([0.5, 2.0]), layer_norm_eps=np.float32(1)
    )
    config.query_grid = np.array([2, 3])
    config.save_pretrained(tmp_path)
    again = MSResamplerProjectorConfig.from_pretrained(tmp_path)
    assert token_grid(again.visual_tokens, (24, 24)) == token_grid(plain, (24, 24))
    assert (again.hidden_size, again.query_grid, again.scope_sigmas) == (64, [2, 3], [0.5, 2.0])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"vision_feature_layers": -2}, "is not a field of MSResamplerConfig; did you mean `vision_feature_layer`"),
        ({"projector_config": {"scope_head": [1]}}, "did you mean `scope_heads`?"),
        ({"projector_config": {"zzzz": 1}}, "known fields are "),
        ({"temperature": 0.5}, "`temperature` is not a field of MSResamplerConfig"),
        ({"vision_feature_layer": []}, "`vision_feature_layer` names no layer of the tower"),
        ({"vision_feature_layer": [-2, -26]}, "`vision_feature_layer` -26 does not exist: the tower has 24 layers"),
        ({"vision_prefix_tokens": -1}, "`vision_prefix_tokens` must not be negative, got -1"),
        ({"image_token_id": -1}, "`image_token_id` -1 is outside the language model's vocabulary of 32000"),
        ({"image_token_id": 32000}, "`image_token_id` 32000 is outside the language model's vocabulary of 32000"),
        ({"vision_feature_layer": 30}, "`vision_feature_layer` 30 does not exist: the tower has 24 layers"),
        ({"vision_config": PvtConfig()}, "the vision tower `pvt` puts in front of its patches is not known here"),
    ],
)  # fmt: skip
def test_models_that_cannot_be(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MSResamplerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"scope_sigmas": []}, "`scope_sigmas` needs at least one scope"),
        ({"projector_type": "resampler", "scope_sigmas": [0.5, None]}, "`resampler` has a single scope"),
        ({"projector_type": "mlp", "scope_sigmas": [0.5, None]}, "`scope_sigmas` is a field of `ms_resampler`: `mlp`"),
        ({"projector_type": "mqt", "pooled_mlp": True}, "`pooled_mlp` is a field of `ms_resampler`: `mqt` has no such"),
        ({"projector_type": "resampler_"}, "There is no `projector_type` `resampler_`; did you mean `resampler`?"),
        ({"projector_type": "xyz"}, "There is no `projector_type` `xyz`; use one of ms_resampler, "),
        ({"fusion": "head"}, "`fusion` is not a field of MSResamplerProjectorConfig; it was one"),
        ({"scope_sigmas": [None]}, r"a scope that is not global.*`scope_sigmas` \[None\]"),
        ({"projector_type": "ms_resampler_branches", "scope_heads": [1]}, "`scope_heads` is a field of `ms_"),
        ({"branch_form": {"fusion": "head"}}, "`branch_form` is a field of `ms_resampler_branches` and `resampler`"),
        ({"projector_type": "resampler", "branch_form": {"fusion": "mean"}}, "cannot have `fusion` 'mean'; it may"),
        ({"projector_type": "resampler", "branch_form": {"prior": "none"}}, "cannot have `prior` 'none'"),
        ({"scope_sigmas": [0.5, -1.0]}, "sigma must be positive, or None for the global scope, got -1.0"),
        ({"hidden_size": 30}, "must be a multiple of 4"),
        ({"hidden_size": 32, "num_attention_heads": 5}, "of `num_attention_heads`, got 32 and 5 heads"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1, got 0"),
        ({"query_grid": [4]}, r"`query_grid` must be \[rows, columns\]"),
        ({"visual_tokens": 0}, "`visual_tokens` must be at least 1"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads` is a field of `idefics2_perceiver`: `ms_resampler`"),
        ({"fusion_layers": 1}, "`fusion_layers` is a field of `llava_mini`: `ms_resampler` has no such thing"),
        ({"projector_type": "llava_mini", "fusion_layers": -1}, "`fusion_layers` must not be negative, got -1"),
        (
            {"projector_type": "idefics2_perceiver", "num_attention_heads": 8, "num_key_value_heads": 3},
            "`num_key_value_heads` must divide `num_attention_heads` 8, got 3",
        ),
        ({"num_attention_heads": 2, "hidden_size": 32}, r"2 heads among 3 scopes, at least one a scope\. In"),
        (
            {"scope_heads": [8, 8]},
            r"shares 12 heads among 3 scopes, at least one a scope; `scope_heads` \[8, 8\] does not",
        ),
        ({"scope_sigmas": [0.5, math.inf]}, "sigma must be positive, or None for the global scope, got inf"),
        ({"scope_sigmas": [0.0]}, "sigma must be positive"),
        ({"visual_tokens": [3, 0]}, r"`visual_tokens` must be \[rows, columns\], two positive integers, got \[3, 0\]"),
        ({"scope_sigma": [0.5]}, "`scope_sigma` is not a field of MSResamplerProjectorConfig; did you mean"),
    ],
)  # fmt: skip
def test_projectors_that_cannot_be(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        MSResamplerProjectorConfig(**fields)


@pytest.mark.parametrize(
    ("width", "heads", "shares"),
    [
        (64, 4, [2, 1, 1]),
        (96, 3, [1, 1, 1]),
        (128, 4, [2, 1, 1]),
        (160, 4, [2, 1, 1]),
        (800, 10, [8, 1, 1]),
        (768, 12, [8, 2, 2]),
        (1024, 16, [12, 2, 2]),
    ],
)
def test_a_width_alone_is_enough(width, heads, shares):
    config = MSResamplerProjectorConfig(hidden_size=width)
    assert (config.num_attention_heads, config.scope_heads) == (heads, shares)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (96, 1), (160, 2), (800, 10), (1024, 16)])
@pytest.mark.parametrize("kind", ["ms_resampler_branches", "resampler", "perceiver"])
def test_heads_that_no_scopes_share_are_at_least_64_wide(width, heads, kind):
    assert MSResamplerProjectorConfig(hidden_size=width, projector_type=kind).num_attention_heads == heads


@given(st.integers(1, 600).map(lambda n: 4 * n), st.integers(1, 8))
def test_every_width_has_heads_for_its_scopes(width, scopes):
    if width < scopes:
        return
    config = MSResamplerProjectorConfig(hidden_size=width, scope_sigmas=[0.5] * scopes)
    assert width % config.num_attention_heads == 0
    assert sum(config.scope_heads) == config.num_attention_heads
    assert min(config.scope_heads) >= 1


WRONG_TYPES = [
    (MSResamplerProjectorConfig, "projector_type", 3),
    (MSResamplerProjectorConfig, "pooled_mlp", 1),
    (MSResamplerProjectorConfig, "visual_tokens", True),
    (MSResamplerProjectorConfig, "visual_tokens", [2, True]),
    (MSResamplerProjectorConfig, "scope_heads", [True, 2]),
    (MSResamplerProjectorConfig, "hidden_size", "64"),
    (MSResamplerProjectorConfig, "hidden_size", True),
    (MSResamplerProjectorConfig, "scope_sigmas", [0.5, "global"]),
    (MSResamplerProjectorConfig, "visual_tokens", [2.0, 2.0]),
    (MSResamplerConfig, "vision_feature_layer", -2.0),
    (MSResamplerConfig, "vision_feature_layer", [-2, None]),
    (MSResamplerConfig, "image_token_id", None),
    (MSResamplerConfig, "projector_config", "ms_resampler"),
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG_TYPES)
def test_types_are_checked_when_a_field_is_given_and_when_it_is_set(kind, field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Validation error for field '{field}'"):
        kind(**{field: value})
    config = kind()
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Validation error for field '{field}'"):
        setattr(config, field, value)


def read(folder, projector: dict, **root) -> MSResamplerConfig:
    """The configuration read from a file with these fields."""
    tiny_models.tiny_config().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text()) | root
    (folder / "config.json").write_text(json.dumps(written | {"projector_config": projector}))
    return MSResamplerConfig.from_pretrained(folder)


def test_a_key_of_a_later_version_is_ignored_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="`scope_tilt`, which MSResamplerProjectorConfig does not know") as warned:
        config = read(tmp_path, {"hidden_size": 64, "scope_tilt": 0.1})
    assert len(warned) == 1
    assert config.projector_config.hidden_size == 64
    assert "scope_tilt" not in config.to_dict()["projector_config"]
    with pytest.warns(UserWarning, match="`later`, `other`, which MSResamplerConfig does not know") as warned:
        read(tmp_path, {}, later=1, other=[])
    assert len(warned) == 1


# As version 0.1 wrote them.
EARLIER = {
    "scope_prior": "gaussian",
    "learn_scopes": True,
    "tile_heads": True,
    "scope_layout": "heads",
    "scope_heads": [2, 1, 1],
    "fusion": "token",
    "share_kv": True,
    "patch_conv": True,
    "cell_residual": True,
    "pooled_mlp": False,
    "query_init": "none",
    "prior_form": "channels",
    "scope_sigmas": [0.5, 1.5, None],
    "num_attention_heads": 4,
    "hidden_size": 32,
}
NO_EXTRAS = {"fusion": "head", "patch_conv": False, "tile_heads": False, "cell_residual": False}


@pytest.mark.parametrize(
    ("changes", "kind", "form"),
    [
        ({}, "ms_resampler", None),
        ({"prior_form": "bias"}, "ms_resampler", None),
        ({"projector_type": "resampler", "scope_sigmas": [0.5], "scope_heads": [4]}, "ms_resampler", None),
        ({"scope_layout": "branches", "scope_heads": None, "query_init": "learned"}, "ms_resampler_branches", None),
        (
            {"scope_layout": "branches", "scope_heads": None, "query_init": "learned"} | NO_EXTRAS,
            "ms_resampler_branches",
            NO_EXTRAS,
        ),
        (
            {"scope_layout": "branches", "scope_heads": None, "query_init": "learned", "fusion": "static"},
            "ms_resampler_branches",
            {"fusion": "static"},
        ),
        ({"query_init": "learned", "scope_sigmas": [None], "scope_heads": [4]}, "ms_resampler_branches", None),
        (
            {"projector_type": "resampler", "query_init": "learned", "scope_sigmas": [None], "scope_heads": [4]},
            "resampler",
            None,
        ),
        (
            {"projector_type": "mqt", "query_init": "learned", "scope_sigmas": None, "scope_heads": None},
            "mqt",
            None,
        ),
    ],
    ids=str,
)
def test_a_file_of_an_earlier_version_is_read(changes, kind, form, tmp_path):
    config = read(tmp_path, EARLIER | changes).projector_config
    assert (config.projector_type, config.branch_form) == (kind, form)
    assert not set(config.to_dict()) & (set(EARLIER) - set(MSResamplerProjectorConfig.__dataclass_fields__))
    assert MSResamplerProjectorConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"scope_prior": "window"},
        {"learn_scopes": False},
        {"fusion": "static"},
        {"patch_conv": False},
        {"query_init": "learned"},
        {"query_init": "content", "scope_layout": "branches"},
        {"share_kv": False, "scope_layout": "branches", "query_init": "learned"},
        {"projector_type": "mqt", "cell_residual": False, "scope_sigmas": None, "scope_heads": None},
    ],
    ids=str,
)
def test_what_only_an_earlier_version_had_is_refused(changes, tmp_path):
    name, value = next(iter(changes.items()))
    if name == "projector_type":
        name, value = "cell_residual", False
    with pytest.raises(ValueError, match=f"was made with `{name}` {value!r}, which this version does not have: load"):
        read(tmp_path, EARLIER | changes)


def test_importing_the_package_changes_no_table_of_transformers():
    """`transformers serve` alone needs our name in one: there it is added with the first configuration."""
    code = """
import sys
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as names
before = dict(names)
from ms_resampler import MSResamplerConfig
MSResamplerConfig()
assert names == before
import types
sys.modules["transformers.cli.serving.model_manager"] = types.ModuleType("model_manager")
MSResamplerConfig()
assert dict(names) == before | {"ms_resampler": "MSResamplerForConditionalGeneration"}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_json_alone_rebuilds_the_configuration(tmp_path):
    config = tiny_models.tiny_config(projector={"scope_sigmas": [0.4, None, 2.0, None], "visual_tokens": [2, 3]})
    config.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    again = MSResamplerConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert MSResamplerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert again.projector_config.scope_sigmas == [0.4, None, 2.0, None]
    assert again.projector_config.scope_names == ["local", "global 2", "regional", "global 4"]


def test_what_transformers_writes_is_read_again(tmp_path):
    config = tiny_models.tiny_config()
    config.use_cache = False  # as Trainer does; transformers drops it again when it loads
    config.quantization_config = {"quant_method": "hqq"}
    config.custom_pipelines = {"image-to-answer": {"impl": "pipeline.Pipeline"}}
    config.fusion_config = {}
    config.save_pretrained(tmp_path)
    options = {"attn_implementation": "eager", "output_attentions": False, "num_labels": 3, "dtype": torch.bfloat16}
    again = MSResamplerConfig.from_pretrained(tmp_path, **options)
    assert (again.fusion_config, again.num_labels) == ({}, 3)
    assert again.quantization_config == {"quant_method": "hqq"}
    assert again.custom_pipelines == config.custom_pipelines
    assert again.text_config._attn_implementation == "eager"
    assert again.dtype == torch.bfloat16


def test_scopes_may_be_whole_numbers_and_keep_their_nulls():
    config = MSResamplerProjectorConfig(scope_sigmas=[1, None, 0.25], num_attention_heads=8)
    again = MSResamplerProjectorConfig.from_dict(config.to_dict())
    assert again.scope_sigmas == [1, None, 0.25]
    assert again.num_scopes == 3
    assert again.scope_names == ["regional", "global", "local"]


def test_auto_map_is_local_whatever_a_repository_wrote(tmp_path):
    tiny_models.tiny_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["auto_map"] = {name: f"someone/else--{where}" for name, where in AUTO_MAP.items()}
    assert MSResamplerConfig.from_dict(written).auto_map == AUTO_MAP


@pytest.mark.parametrize("size", [(24, 24), (32, 16)])
# SigLIP 2 reads patches, not pixels; the model's tests hold its features against the tower's.
@pytest.mark.parametrize("tower", sorted(set(tiny_models.TOWERS) - {"siglip2_vision_model"}))
@torch.no_grad()
def test_prefix_tokens_and_patch_size_are_those_of_the_tower(tower, size):
    config = tiny_models.tiny_config(tower)
    model = AutoModel.from_config(config.vision_config)
    interpolated = tower in ("clip_vision_model", "siglip_vision_model", "vit")
    options = {"interpolate_pos_encoding": True} if interpolated else {}
    features = model(torch.zeros(1, 3, *size), **options).last_hidden_state
    rows, columns = config.patch_grid(size)
    if features.ndim == 4:
        assert features.shape[1:] == (config.feature_width, rows, columns)
    else:
        assert features.shape[1:] == (config.num_prefix_tokens + rows * columns, config.feature_width)


def test_prefix_tokens_of_an_unknown_tower_may_be_told():
    assert MSResamplerConfig(vision_config=PvtConfig(), vision_prefix_tokens=5, vision_feature_layer=-1)


def test_one_place_counts_tokens():
    config = MSResamplerConfig()
    assert config.patch_grid((336, 672)) == (24, 48)
    assert config.token_grid((336, 336)) == (12, 12)
    assert config.token_grid((336, 672), 32) == (4, 8)
    assert config.feature_width == 1024
    assert MSResamplerConfig(vision_feature_layer=[-2, 5]).feature_width == 2048


def test_the_defaults_are_llavas_parts():
    """CLIP ViT-L/14 at 336 pixels, read before its last layer, as LLaVA-1.5's paper and CLIP's table 20 have them."""
    config = MSResamplerConfig()
    assert config.vision_feature_layer == -2
    vision = config.vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.projection_dim) == (1024, 4096, 768)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (24, 16)
    assert (vision.image_size, vision.patch_size) == (336, 14)
    assert config.native_patch_grid == (24, 24)
