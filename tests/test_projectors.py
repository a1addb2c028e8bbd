"""The peers: each computes what its original computed, at any size, and works inside a whole model."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny_models import asked, picture, tiny_model, tiny_processor
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Blip2ForConditionalGeneration,
    DeformableDetrConfig,
    Idefics2Config,
)
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoderLayer
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from ms_resampler.branches_ms_resampler import init_branches_weights
from ms_resampler.configuration_ms_resampler import PROJECTOR_TYPES
from ms_resampler.projectors_ms_resampler import (
    PROJECTORS,
    SCOPED_PROJECTORS,
    init_projector_weights,
    register_projector,
    rename,
    resize_table,
    sincos_table,
    windows,
)

ORIGINALS = Path(__file__).parent / "reference_projectors"


def sizes(vision, text, patches, tokens, *, layers=1, width=64, heads=4, depth=1, queries=None, key_heads=None):
    """What a projector reads of a model's configuration."""
    return SimpleNamespace(
        feature_width=vision,
        feature_states=[SimpleNamespace(width=vision // layers)] * layers,
        text_width=text,
        native_patch_grid=patches,
        projector_config=SimpleNamespace(
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            num_hidden_layers=depth,
            query_grid=queries or tokens,
            visual_tokens=tokens,
        ),
    )


# File of the original's tensors, its name here, sizes, patch grid and token grid.
PARITY = {
    "honeybee_cabs_small": ("c_abstractor", sizes(64, 96, (8, 8), (4, 4), depth=3), (8, 8), (4, 4)),
    "internvl_pixelshuffle_small": ("pixel_shuffle", sizes(8, 24, (6, 6), (3, 3)), (6, 6), (3, 3)),
    "llava_mlp2x_small": ("mlp", sizes(32, 48, (8, 8), (8, 8)), (8, 8), (8, 8)),
    "mobilevlm_ldpv2_small": ("ldp_v2", sizes(32, 48, (24, 24), (12, 12)), (24, 24), (12, 12)),
    "mqt_small_m16": ("mqt", sizes(64, 96, (8, 8), (4, 4)), (8, 8), (4, 4)),
    "mqt_small_m9": ("mqt", sizes(64, 96, (8, 8), (3, 3), queries=(4, 4)), (8, 8), (3, 3)),
    "open_flamingo_small": ("perceiver", sizes(64, 64, (8, 8), (3, 3), depth=2), (8, 8), (3, 3)),
    "qwenvl_resampler_small": ("qwen_resampler", sizes(32, 64, (8, 8), (3, 3)), (8, 8), (3, 3)),
    "saep_small": ("saep", sizes(80, 48, (8, 8), (4, 4), layers=5), (8, 8), (4, 4)),
}


@pytest.mark.parametrize("name", PARITY)
def test_a_peer_computes_what_its_original_computed(name):
    kind, config, patches, tokens = PARITY[name]
    with safe_open(ORIGINALS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
        assert json.loads(file.metadata()["meta"])["commit"]
    original = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    inputs = [tensors[key] for key in sorted(tensors) if key.startswith("in.")]
    x_BNC = torch.cat(inputs, dim=-1).flatten(1, -2)

    projector = PROJECTORS[kind](config)
    own = projector.state_dict()
    names = rename(own, projector.original_names)
    assert sorted(names.values()) == sorted(original)  # one to one
    projector.load_state_dict({ours: original[theirs].reshape(own[ours].shape) for ours, theirs in names.items()})
    with torch.no_grad():
        y_BMT = projector(x_BNC, patches, tokens)
    assert y_BMT.shape == tensors["out"].shape
    assert (y_BMT - tensors["out"]).abs().max() <= 1e-5 * tensors["out"].abs().max()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_token_packer_is_attention_of_one_query_in_its_own_cell(scale):
    """Token by token and cell by cell, by the published equations."""
    torch.manual_seed(0)
    patches, tokens = (2 * scale, 3 * scale), (2, 3)
    projector = PROJECTORS["token_packer"](sizes(48, 20, patches, tokens, layers=3, width=32))
    x_BNC = torch.randn(2, patches[0] * patches[1], 48)
    with torch.no_grad():
        got_BMT = projector(x_BNC, patches, tokens)
        x = x_BNC.unflatten(1, patches)
        for row in range(2):
            for column in range(3):
                cell = x[:, scale * row : scale * (row + 1), scale * column : scale * (column + 1)]
                middle = cell[:, (scale - 1) // 2 : scale // 2 + 1, (scale - 1) // 2 : scale // 2 + 1, 32:].mean((1, 2))
                query = projector.q_norm(projector.q_proj(middle))[:, None]
                key = projector.k_norm(projector.k_proj(cell.flatten(1, 2)))
                value = projector.v_norm(projector.v_proj(cell.flatten(1, 2)))
                expected_BT = projector.mlp(projector.attention(query, key, value)[0][:, 0])
                torch.testing.assert_close(got_BMT[:, 3 * row + column], expected_BT, rtol=1e-5, atol=1e-6)


def read_original(name):
    """The tensors of a file of an original's, its weights and its metadata, in float32."""
    with safe_open(ORIGINALS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
        meta = json.loads(file.metadata()["meta"])
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    for key in [key.removeprefix("scale.") for key in tensors if key.startswith("scale.")]:
        state[key] = tensors[f"state_int8.{key}"] * tensors[f"scale.{key}"]
    return tensors, state, meta


@pytest.mark.parametrize("scale", [2, 3])
def test_delta_llava_computes_what_its_original_computed(scale):
    """The original reads the last of its layers twice; here the two were drawn apart."""
    tensors, state, _ = read_original("delta_llava_small")
    tokens = (6 // scale, 6 // scale)
    projector = PROJECTORS["delta_llava"](sizes(512, 48, (6, 6), tokens, layers=4, width=128))
    load_renamed(projector, state)
    with torch.no_grad():
        y_BMT = projector.pack(tensors["in.x_single"], tensors["in.x_multi"], (6, 6), tokens)
    torch.testing.assert_close(y_BMT, tensors[f"out.s{scale}"], rtol=0, atol=1e-5)


def test_delta_llavas_queries_are_the_last_layers():
    torch.manual_seed(0)
    projector = PROJECTORS["delta_llava"](sizes(48, 20, (4, 4), (2, 2), layers=3, width=32)).apply(
        init_projector_weights
    )
    x_BNC = torch.randn(2, 16, 48)
    torch.testing.assert_close(projector(x_BNC, (4, 4), (2, 2)), projector.pack(x_BNC[..., 32:], x_BNC, (4, 4), (2, 2)))


def load_renamed(projector, original):
    """Loads an original's state dict through the table of names, one to one."""
    names = rename(projector.state_dict(), projector.original_names)
    assert sorted(names.values()) == sorted(original)
    projector.load_state_dict({ours: original[theirs] for ours, theirs in names.items()})


@pytest.mark.parametrize(("given", "key_heads"), [(None, 2), (1, 1), (4, 4), (8, 8)])
def test_idefics2_computes_what_transformers_whole_connector_does(given, key_heads):
    torch.manual_seed(0)
    text = {"model_type": "mistral", "hidden_size": 48, "intermediate_size": 128, "num_attention_heads": 4}
    perceiver = {"hidden_size": 48, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 8}
    original = Idefics2Connector(
        Idefics2Config(
            vision_config={"hidden_size": 32},
            text_config=text,
            perceiver_config=perceiver | {"resampler_head_dim": 8, "num_key_value_heads": key_heads},
        )
    )
    torch.nn.init.normal_(original.perceiver_resampler.latents)
    projector = PROJECTORS["idefics2_perceiver"](sizes(32, 48, (4, 4), (2, 3), heads=8, depth=2, key_heads=given))
    load_renamed(projector, original.state_dict())
    x_BNC = torch.randn(2, 16, 32)
    with torch.no_grad():
        expected = original(x_BNC, torch.ones(2, 16, dtype=torch.bool))
        torch.testing.assert_close(projector(x_BNC, (4, 4), (2, 3)), expected)
    assert expected.std(dim=1).min() > 0.01  # the tokens differ


def test_the_q_former_computes_what_blip_2_does_after_its_tower():
    torch.manual_seed(0)
    qformer = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", "hidden_size": 48, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    original = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=tower | {"image_size": 8, "patch_size": 2},
            qformer_config=qformer | {"encoder_hidden_size": 32},
            text_config=text | {"vocab_size": 64, "word_embed_proj_dim": 48},
            num_query_tokens=6,
        )
    ).eval()
    torch.nn.init.normal_(original.query_tokens)
    projector = PROJECTORS["q_former"](sizes(32, 48, (4, 4), (2, 3), depth=3)).eval()
    wanted = ("query_tokens", "qformer.", "language_projection.")
    load_renamed(projector, {key: value for key, value in original.state_dict().items() if key.startswith(wanted)})
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        patches = original.vision_model(pixels).last_hidden_state  # CLS included, as BLIP-2 does
        expected = original.get_image_features(pixels, return_dict=True).pooler_output
        torch.testing.assert_close(projector(patches, (4, 4), (2, 3)), expected)


@pytest.mark.parametrize(("text", "cell"), [(48, (2, 2)), (40, (1, 1)), (72, (2, 3))])
def test_ldp_is_its_equations(text, cell):
    """With the original's names of weights, in float64, convolutions as sums over shifted maps."""
    torch.manual_seed(0)
    patches, tokens = (4, 6), (4 // cell[0], 6 // cell[1])
    projector = PROJECTORS["ldp"](sizes(16, text, patches, tokens)).double()
    own = {key: torch.randn_like(value) * 0.3 for key, value in projector.state_dict().items()}
    projector.load_state_dict(own)
    names = rename(own, projector.original_names)
    w = {names[key].removeprefix("model."): value for key, value in own.items()}
    squeezed = {48: 16, 40: 16, 72: 24}[text]  # of 12, 10 and 18
    assert w["mb_block.1.block.1.fc1.weight"].shape == (squeezed, text, 1, 1)
    x_BNC = torch.randn(2, 24, 16, dtype=torch.float64)

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        normed = (x - mean) / (var + 1e-5).sqrt()
        return normed * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def mix(x, name):
        return torch.einsum("oi,bihw->bohw", w[f"{name}.weight"][..., 0, 0], x)

    def gate(x, name):
        mean = x.mean((2, 3), keepdim=True)
        hidden = (mix(mean, f"{name}.fc1") + w[f"{name}.fc1.bias"][:, None, None]).clamp(min=0)
        return x * ((mix(hidden, f"{name}.fc2") + w[f"{name}.fc2.bias"][:, None, None] + 3) / 6).clamp(0, 1)

    def block(x, name, stride):
        padded, kernel = torch.zeros(2, text, 6, 8, dtype=torch.float64), w[f"{name}.0.0.weight"][:, 0]
        padded[:, :, 1:5, 1:7] = x
        y = sum(
            kernel[:, i, j, None, None] * padded[:, :, i : i + 4 : stride[0], j : j + 6 : stride[1]]
            for i in range(3)
            for j in range(3)
        )
        y = norm(y, f"{name}.0.1")
        y = y * ((y + 3) / 6).clamp(0, 1)
        y = norm(mix(gate(y, f"{name}.1"), f"{name}.2.0"), f"{name}.2.1")
        return x + y if stride == (1, 1) else y

    h = x_BNC @ w["mlp.1.weight"].mT + w["mlp.1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    h = (h @ w["mlp.3.weight"].mT + w["mlp.3.bias"]).mT.reshape(2, text, 4, 6)
    y = block(block(h, "mb_block.1.block", (1, 1)), "mb_block.2.block", cell)
    torch.testing.assert_close(projector(x_BNC, patches, tokens), y.flatten(2).mT, rtol=1e-9, atol=1e-9)


def test_the_d_abstractor_is_its_decoder():
    """With the original's names of weights, in float64, and with transformers' layers of Deformable DETR."""
    torch.manual_seed(0)
    fields = {"d_model": 64, "decoder_attention_heads": 4, "decoder_ffn_dim": 128, "num_feature_levels": 1}
    layers = [DeformableDetrDecoderLayer(DeformableDetrConfig(**fields, dropout=0.0)).double() for _ in range(2)]
    renamed = {"self_attn.o_proj": "self_attn.out_proj", "mlp.fc": "fc"}
    state = {}
    for number, layer in enumerate(layers):
        for key, value in layer.state_dict().items():
            theirs = next((key.replace(*pair) for pair in renamed.items() if key.startswith(pair[0])), key)
            state[f"layers.{number}.{theirs}"] = value.normal_(std=0.5)
    for name, shape in {
        "input_proj.0.weight": (64, 32),
        "input_proj.0.bias": (64,),
        "v_pos_emb": (1, 24, 64),
        "query_position_embeddings.weight": (6, 64),
        "output_proj.weight": (48, 64),
        "output_proj.bias": (48,),
    }.items():
        state[name] = torch.randn(shape, dtype=torch.float64)
    state["reference_points"] = torch.rand(1, 6, 2, dtype=torch.float64)

    projector = PROJECTORS["d_abstractor"](sizes(32, 48, (4, 6), (2, 3), depth=2)).double()
    own = projector.state_dict()
    names = rename(own, projector.original_names)
    assert sorted(names.values()) == sorted(state)
    projector.load_state_dict({ours: state[theirs].reshape(own[ours].shape) for ours, theirs in names.items()})
    x_BNC = torch.randn(2, 24, 32, dtype=torch.float64)
    with torch.no_grad():
        x = x_BNC @ state["input_proj.0.weight"].mT + state["input_proj.0.bias"] + state["v_pos_emb"]
        position = x.reshape(2, 2, 2, 3, 2, 64).mean((2, 4)).flatten(1, 2)
        z = state["query_position_embeddings.weight"].expand(2, -1, -1)
        for layer in layers:
            z = layer(
                z,
                object_queries_position_embeddings=position,
                reference_points=state["reference_points"].expand(2, -1, -1)[:, :, None],
                spatial_shapes=torch.tensor([[4, 6]]),
                spatial_shapes_list=[(4, 6)],
                level_start_index=torch.tensor([0]),
                encoder_hidden_states=x,
            )
        expected = z @ state["output_proj.weight"].mT + state["output_proj.bias"]
        torch.testing.assert_close(projector(x_BNC, (4, 6), (2, 3)), expected, rtol=1e-9, atol=1e-9)


def test_the_d_abstractor_starts_at_the_patches_with_points_on_rays():
    projector = PROJECTORS["d_abstractor"](sizes(32, 48, (4, 8), (2, 4), width=32)).apply(init_projector_weights)
    x, y = projector.place.unflatten(0, (2, 4)).unbind(-1)
    torch.testing.assert_close(x, torch.tensor([1, 17 / 3, 31 / 3, 15]).expand(2, 4) / 16)
    torch.testing.assert_close(y, torch.tensor([[0.125], [0.875]]).expand(2, 4))
    offsets = projector.layers[0].point_offsets.bias.unflatten(0, (4, 4, 2))
    rays = [[1.0, 0], [0, 1], [-1, 0], [0, -1]]
    expected = torch.tensor([[[step * axis for axis in ray] for step in (1, 2, 3, 4)] for ray in rays])
    torch.testing.assert_close(offsets, expected, rtol=0, atol=1e-6)


def test_average_pooling_is_the_mlp_of_the_mean_of_each_cell():
    torch.manual_seed(0)
    projector = PROJECTORS["avg_pool"](sizes(16, 20, (4, 6), (2, 3)))
    x_BNC = torch.randn(2, 24, 16)
    means = [
        x_BNC.unflatten(1, (4, 6))[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2))
        for r in (0, 1)
        for c in (0, 1, 2)
    ]
    torch.testing.assert_close(projector(x_BNC, (4, 6), (2, 3)), projector.mlp(torch.stack(means, dim=1)))


@pytest.mark.parametrize("kind", ["avg_pool", "c_abstractor", "ldp", "ldp_v2", "token_packer", "delta_llava", "mqt"])
def test_elastic_peers_take_other_and_oblong_grids(kind):
    torch.manual_seed(0)
    projector = PROJECTORS[kind](sizes(16, 20, (6, 6), (3, 3), width=16, queries=(4, 4)))
    if kind == "c_abstractor":
        torch.nn.init.normal_(projector.position)
    assert projector(torch.randn(2, 32, 16), (4, 8), (2, 4)).shape == (2, 8, 20)


@pytest.mark.parametrize(
    ("kind", "tokens", "sentence"),
    [
        ("mlp", (3, 3), r"for 6 x 6 patches set `visual_tokens` to \[6, 6\]"),
        ("pixel_shuffle", (2, 2), r"cells of 2 x 2 patches, not of 3 x 3"),
        ("ldp", (4, 4), "`ldp` joins whole patches: .* 6 x 6 patches cannot become 4 x 4 tokens"),
        ("d_abstractor", (2, 3), "one token for each of its 9 queries"),
        ("saep", (4, 4), "6 x 6 patches cannot become 4 x 4 tokens"),
        ("token_packer", (4, 4), "6 x 6 patches cannot become 4 x 4 tokens"),
        ("delta_llava", (4, 4), "`delta_llava` joins whole patches: .* 6 x 6 patches cannot become 4 x 4 tokens"),
        ("mqt", (4, 3), "`mqt` has 9 queries"),
        ("qwen_resampler", (2, 3), "one token for each of its 9 queries"),
        ("llava_mini", (2, 3), "one token for each of its 9 queries"),
        ("perceiver", (2, 3), "one token for each of its 9 queries"),
        ("idefics2_perceiver", (2, 3), "one token for each of its 9 queries"),
        ("q_former", (2, 3), "one token for each of its 9 queries"),
    ],
)
def test_a_budget_that_a_peer_cannot_give_is_refused(kind, tokens, sentence):
    projector = PROJECTORS[kind](sizes(16, 20, (6, 6), (3, 3), width=16))
    with pytest.raises(ValueError, match=sentence):
        projector(torch.randn(1, 36, 16), (6, 6), tokens)


def test_heads_that_do_not_share_out_the_width_are_refused():
    with pytest.raises(ValueError, match="`num_attention_heads` 4 does not divide the width 18"):
        PROJECTORS["mqt"](sizes(18, 20, (6, 6), (3, 3)))


def test_a_table_of_positions_tells_the_column_and_then_the_row():
    table = sincos_table((3, 4), 8).unflatten(0, (3, 4))
    for row in range(3):
        for column in range(4):
            waves = [
                wave(index * rate) for index in (column, row) for wave in (math.sin, math.cos) for rate in (1, 0.01)
            ]
            torch.testing.assert_close(table[row, column], torch.tensor(waves))
    rates = [10000 ** (-number / 3) for number in range(3)]
    waves = [wave(2 * rate) for wave in (math.sin, math.cos) for rate in rates] + [0.0] * 3 + [1.0] * 3
    torch.testing.assert_close(sincos_table((1, 3), 12)[2], torch.tensor(waves))


def test_oblong_cells_are_read_row_by_row():
    """Cells of one row and three columns, whose patches pixel_shuffle lays side by side."""
    patches = torch.arange(2 * 6, dtype=torch.float32).reshape(1, 12, 1)
    assert windows(patches, (2, 6), (1, 3))[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    model = tiny_model(projector={"projector_type": "pixel_shuffle", "visual_tokens": [6, 2]})
    shuffle = model.model.projector
    assert shuffle.cell == (1, 3)
    x = torch.randn(1, 36, model.config.feature_width)
    side_by_side = x.reshape(1, 12, 3 * model.config.feature_width)  # three patches that follow one another
    torch.testing.assert_close(shuffle(x, (6, 6), (6, 2)), shuffle.mlp(shuffle.norm(side_by_side)))


def test_a_table_is_resized_between_its_values_and_not_at_its_own_size():
    table = torch.randn(12, 8)
    assert torch.equal(resize_table(table, (3, 4), (3, 4)), table)
    rising = torch.arange(8.0)[None, :, None].expand(6, 8, 2).flatten(0, 1)  # by one a column
    inner = resize_table(rising, (6, 8), (6, 16)).unflatten(0, (6, 16))[:, 4:-4]
    between = (torch.arange(4.0, 12)[None, :, None] / 2 - 0.25).expand(6, 8, 2)
    torch.testing.assert_close(inner, between, rtol=0, atol=0.05)  # a cubic kernel bends straight lines a little


BUDGETS = {"mlp": [6, 6]}


@pytest.mark.parametrize("kind", [*PROJECTORS, *SCOPED_PROJECTORS])
def test_a_projector_in_a_whole_model_trains_saves_loads_and_generates(kind, tmp_path):
    budget = BUDGETS.get(kind, [3, 3])
    torch.manual_seed(0)
    model = tiny_model(projector={"projector_type": kind, "query_grid": [3, 3], "visual_tokens": budget})
    processor = tiny_processor(visual_tokens=budget)
    inputs = asked(processor, "What?", picture())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(weight.grad is not None for weight in model.model.projector.parameters())
    optimizer.step()

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.projector_config.projector_type == kind
    # Convolutions of one pixel round differently where weights lie differently in memory: LDP's gates.
    within = 1e-5 if kind == "ldp" else 0
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=within)
    assert loaded.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    if kind in SCOPED_PROJECTORS:
        maps = loaded.get_image_features(inputs["pixel_values"], output_scopes=True).scope_attentions
        assert maps[0].shape == (loaded.config.projector_config.num_scopes, 9, 36)
        return
    with pytest.raises(ValueError, match=f"`{kind}` has none"):
        loaded.get_image_features(inputs["pixel_values"], output_scopes=True)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_peer_without_weights_in_the_checkpoint_starts_afresh(kind, tmp_path):
    """As when a projector is put on a model that had none: every parameter is drawn, every table is there."""
    projector = {"projector_type": kind, "query_grid": [3, 3], "visual_tokens": BUDGETS.get(kind, [3, 3])}
    model = tiny_model(projector=projector)
    kept = {name: tensor for name, tensor in model.state_dict().items() if ".projector." not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {name for name in model.state_dict() if ".projector." in name}
    for name, tensor in loaded.model.projector.state_dict().items():
        assert tensor.isfinite().all(), name
        if name == "position" and kind in ("mqt", "qwen_resampler", "llava_mini"):
            torch.testing.assert_close(tensor, sincos_table((3, 3), tensor.shape[1]))
        elif tensor.dim() > 1 and ".point_" not in name:  # these start at zero
            assert 0 < tensor.std() < 2, name


@pytest.mark.parametrize(("scopes", "name"), [({}, "global"), ({"scope_sigmas": [0.5]}, "local")])
def test_the_resampler_has_one_scope(scopes, name):
    config = tiny_model(projector={"projector_type": "resampler"} | scopes).config.projector_config
    assert config.scope_names == [name]


@pytest.mark.parametrize("kind", ["mqt", "qwen_resampler", "delta_llava", "llava_mini"])
@torch.no_grad()
def test_tables_of_positions_that_stay_in_float32_do_not_matter(kind):
    """transformers leaves buffers as they are when it loads in half precision."""
    torch.manual_seed(0)
    projector = PROJECTORS[kind](sizes(32, 48, (8, 8), (4, 4), width=32)).apply(init_projector_weights)
    x_BNC = torch.randn(2, 64, 32)
    expected = projector(x_BNC, (8, 8), (4, 4))
    for parameter in projector.parameters():
        parameter.data = parameter.data.bfloat16()
    got = projector(x_BNC.bfloat16(), (8, 8), (4, 4))
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 0.03 * expected.norm()


def test_a_projector_of_ones_own_is_registered_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("ms_resampler.projectors_ms_resampler.PROJECTORS", dict(PROJECTORS))
    monkeypatch.setattr("ms_resampler.projectors_ms_resampler.SCOPED_PROJECTORS", dict(SCOPED_PROJECTORS))
    for name in ("my_pool", "my_resampler"):
        with pytest.raises(ValueError, match=f"There is no `projector_type` `{name}`"):
            tiny_model(projector={"projector_type": name})
    monkeypatch.setattr("ms_resampler.configuration_ms_resampler.PROJECTOR_TYPES", types := dict(PROJECTOR_TYPES))
    monkeypatch.setattr("ms_resampler.projectors_ms_resampler.PROJECTOR_TYPES", types)

    class Doubled(PROJECTORS["avg_pool"]):
        def forward(self, x_BNC, patch_grid, token_grid):
            return 2 * super().forward(x_BNC, patch_grid, token_grid)

    class Renamed(SCOPED_PROJECTORS["ms_resampler"]):
        pass

    register_projector("my_pool", Doubled)
    register_projector("my_resampler", Renamed, fields_of="ms_resampler")
    with pytest.raises(ValueError, match="There is a projector `mqt` already"):
        register_projector("mqt", Doubled)
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        once, twice = (
            tiny_model(projector={"projector_type": kind}).get_image_features(pixels).pooler_output[0]
            for kind in ("avg_pool", "my_pool")
        )
    torch.testing.assert_close(twice, 2 * once)
    model = tiny_model(projector={"projector_type": "my_resampler", "scope_sigmas": [0.5, 2]})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded.model.projector) is Renamed
    assert loaded.get_image_features(pixels, output_scopes=True).scope_weights[0].shape == (2, 4)


def test_two_branches_start_with_different_scopes():
    torch.manual_seed(0)
    model = tiny_model(projector={"projector_type": "ms_resampler_branches", "scope_sigmas": [0.5, None]})
    layer = model.model.projector.layers[0]
    init_branches_weights(layer)
    torch.testing.assert_close(layer.scope_embedding.std().item(), 1.0, rtol=0.3, atol=0)
