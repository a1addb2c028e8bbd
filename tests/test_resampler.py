"""The resampler against its equations: outputs, maps and gradients, in every arrangement."""

import math
from itertools import product

import numpy as np
import pytest
import reference_resampler
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses import FakeTensorMode

from ms_resampler import MSResamplerProjectorConfig
from ms_resampler.resampler_ms_resampler import (
    MultiScopeResampler,
    ScopePrior,
    _kept_geometry,
    as_map,
    cell_centres,
    cell_means,
    geometry_of,
    grid_positions,
    init_resampler_weights,
    make_geometry,
    sincos_positions,
    tiles,
)

VISION, TEXT = 6, 10
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 12, "query_grid": [2, 3]}
SMALL |= {"scope_layout": "branches", "fusion": "head", "cell_residual": False, "query_init": "learned"}
NO_QUERIES = {"query_init": "none", "scope_layout": "heads", "fusion": "token"}

FUSIONS = ("head", "token", "static", "mean")
ARRANGEMENTS = [
    *({"fusion": f, "scope_prior": p} for f, p in product(FUSIONS, ("gaussian", "window", "none"))),
    *({"scope_layout": "heads", "fusion": f} for f in ("token", "static", "mean")),
    {"scope_layout": "heads", "fusion": "mean", "scope_prior": "window"},
    {"scope_layout": "heads", "fusion": "token", "scope_heads": [1, 1, 2], "cell_residual": True},
    {"share_kv": False},
    {"share_kv": False, "prior_form": "bias"},
    {"query_init": "content"},
    {"patch_conv": False},
    {"tile_heads": False},
    {"cell_residual": True},
    {"pooled_mlp": True},
    {"num_hidden_layers": 2, "query_init": "content", "cell_residual": True},
    {"learn_scopes": False},
    {"prior_form": "bias"},
    {"scope_sigmas": [None]},
    {"scope_sigmas": [0.3]},
    {"scope_sigmas": [0.4, 0.9, 2, None, None]},
    {"hidden_size": 4, "num_attention_heads": 1},
    {"scope_layout": "heads", "fusion": "token", "scope_sigmas": [0.4, 1, None], "num_hidden_layers": 2},
    *({**NO_QUERIES, "fusion": f, "cell_residual": True} for f in ("token", "mean")),
    {**NO_QUERIES, "prior_form": "bias", "cell_residual": True},
    {**NO_QUERIES, "fusion": "static", "scope_prior": "window", "num_hidden_layers": 2},
    {**NO_QUERIES, "scope_sigmas": [0.5], "num_attention_heads": 1},
    *({**NO_QUERIES, name: False} for name in ("tile_heads", "learn_scopes")),
]  # fmt: skip
GRIDS = [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((5, 2), (3, 1)), ((4, 6), (4, 5)), ((1, 7), (1, 3))]


def make(seed: int = 0, **changes) -> MultiScopeResampler:
    """A small resampler whose every parameter matters."""
    config = MSResamplerProjectorConfig(**SMALL | changes)
    torch.manual_seed(seed)
    resampler = MultiScopeResampler(config, VISION, TEXT).apply(init_resampler_weights)
    with torch.no_grad():
        for parameter in resampler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return resampler


def features(patch_grid, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, math.prod(patch_grid), VISION, generator=torch.Generator().manual_seed(seed))


def relative_error(actual, expected) -> float:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


def by_reference(resampler, x, patch_grid, token_grid):
    weights = {name: tensor.double().numpy() for name, tensor in resampler.state_dict().items()}
    return reference_resampler.resample(weights, resampler.config, x.double().numpy(), patch_grid, token_grid)


@pytest.mark.parametrize("changes", ARRANGEMENTS, ids=str)
def test_outputs_and_maps_are_those_of_the_equations(changes):
    for number, (patch_grid, token_grid) in enumerate(GRIDS[:3]):
        resampler, x = make(number, **changes), features(patch_grid)
        with torch.no_grad():
            y, maps = resampler(x, patch_grid, token_grid, output_scopes=True)
        expected_y, expected_g, expected_a = by_reference(resampler, x, patch_grid, token_grid)
        assert relative_error(y, expected_y) < 1e-5
        assert relative_error(maps.weights_BSM, expected_g) < 1e-5
        assert relative_error(maps.attentions_BSMN, expected_a) < 1e-5


@pytest.mark.parametrize("changes", ARRANGEMENTS, ids=str)
def test_a_float64_module_counts_in_float64(changes):
    resampler, x = make(**changes).double(), features((3, 5)).double()
    with torch.no_grad():
        y, maps = resampler(x, (3, 5), (2, 3), output_scopes=True)
    actual = (y, maps.weights_BSM, maps.attentions_BSMN)
    for tensor, expected in zip(actual, by_reference(resampler, x, (3, 5), (2, 3)), strict=True):
        assert tensor.dtype == torch.float64
        assert relative_error(tensor, expected) < 1e-12


def test_random_arrangements():
    rng = np.random.default_rng(0)
    for number in range(12):
        scopes = [None if rng.random() < 0.3 else float(rng.uniform(0.2, 3)) for _ in range(rng.integers(1, 5))]
        patch_grid, token_grid = (tuple(int(n) for n in rng.integers(1, 6, 2)) for _ in range(2))
        resampler, x = make(number, scope_sigmas=scopes), features(patch_grid, batch=1)
        with torch.no_grad():
            y, _ = resampler(x, patch_grid, token_grid)
        assert relative_error(y, by_reference(resampler, x, patch_grid, token_grid)[0]) < 1e-5, (scopes, patch_grid)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize(("patch_grid", "token_grid"), GRIDS)
@pytest.mark.parametrize(
    "changes", [{}, {"scope_layout": "heads", "fusion": "token"}, {"share_kv": False}, NO_QUERIES], ids=str
)
def test_both_forms_of_the_prior_agree_gradients_included(patch_grid, token_grid, changes, dtype, tolerance):
    channels, bias = (make(prior_form=form, **changes).to(dtype) for form in ("channels", "bias"))
    bias.load_state_dict(channels.state_dict())
    gradients = []
    for resampler in (channels, bias):
        x = features(patch_grid).to(dtype).requires_grad_()
        y, _ = resampler(x, patch_grid, token_grid)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        gradients.append({"x": x.grad, "y": y.detach()} | {n: p.grad for n, p in resampler.named_parameters()})
    loudest = max(gradient.norm() for gradient in gradients[1].values())
    for name, expected in gradients[1].items():  # that of a key's bias is zero but for rounding: softmax ignores it
        error = (gradients[0][name] - expected).norm() / expected.norm().clamp(min=1e-2 * loudest)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize(
    "changes", [{}, {"scope_layout": "heads", "fusion": "token"}, {"share_kv": False}, NO_QUERIES], ids=str
)
def test_both_forms_of_the_prior_agree_in_every_dtype(changes, dtype, tolerance):
    """Within twice what the dtype itself costs; the scores differ in their last digits only."""
    channels, bias = (make(prior_form=form, **changes).to(dtype) for form in ("channels", "bias"))
    bias.load_state_dict(channels.state_dict())
    x = features((8, 8)).to(dtype)
    with torch.no_grad():
        one, other = (resampler(x, (8, 8), (4, 4))[0] for resampler in (channels, bias))
    assert one.dtype == dtype
    assert relative_error(one, other) < tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("changes", [{}, {"scope_layout": "heads", "fusion": "token"}], ids=str)
def test_queries_that_come_once_do_what_queries_of_every_image_do(changes, dtype, tolerance):
    """Those of the first layer, which the images do not change; gradients included."""
    results = []
    for repeats in (1, 3):
        layer = make(**changes).to(dtype).layers[0]
        z_1MD, u_BND = (torch.randn(n, m, 16, generator=torch.Generator().manual_seed(m)) for n, m in ((1, 6), (3, 20)))
        z_BMD = z_1MD.to(dtype).requires_grad_().expand(repeats, -1, -1)
        z, maps = layer(z_BMD, u_BND.to(dtype), 0.0, make_geometry((4, 5), (2, 3), 16, 4, dtype=dtype), True)
        z.float().square().mean().backward()
        results.append([z, maps.weights_BSM, maps.attentions_BSMN, layer.q_proj.weight.grad, layer.o_proj.weight.grad])
    for once, each in zip(*results, strict=True):
        assert once.shape == each.shape
        assert relative_error(once.detach(), each.detach()) < tolerance


SLOPES = [
    {"scope_sigmas": [0.5, None]},
    {"scope_sigmas": [0.5, None], "prior_form": "bias", "share_kv": False},
    {"fusion": "token", "query_init": "content", "num_hidden_layers": 2},
    {"fusion": "static", "scope_layout": "heads"},
    {"fusion": "token", "scope_layout": "heads", "scope_prior": "window"},
    NO_QUERIES,
]


@pytest.mark.parametrize("changes", SLOPES, ids=str)
def test_gradients_are_those_of_finite_differences(changes):
    resampler, x = make(**changes).double(), features((3, 3), batch=1).double()

    def loss_with(moved: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(resampler, moved, (x, (3, 3), (2, 2)))[0].square().sum()

    loss_with({}).backward()
    for name, parameter in resampler.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            ahead, behind = (loss_with({name: parameter + step * direction}).item() for step in (1e-5, -1e-5))
        slope = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5, abs=1e-5), name


def test_only_a_scope_that_ends_has_a_size_to_learn():
    resampler = make(scope_sigmas=[0.5, None])
    resampler(features((3, 3)), (3, 3), (2, 2))[0].square().sum().backward()
    gradient_Gh = resampler.layers[0].prior.log_scale_Gh.grad
    assert gradient_Gh[0].abs().min() > 0
    assert gradient_Gh[1].abs().max() == 0


@pytest.mark.parametrize("loudness", [1, 100, 1e4])
def test_filtering_by_rows_and_columns_holds_whatever_the_scores(loudness):
    """Even where the loudest patch is so far above the others that no number holds its exponential beside theirs."""
    by_axes, plain = (make(**NO_QUERIES, prior_form=form) for form in ("channels", "bias"))
    with torch.no_grad():
        by_axes.layers[0].score[2].weight *= loudness
        plain.load_state_dict(by_axes.state_dict())
        x = features((5, 7))
        one, other = (resampler(x, (5, 7), (3, 2))[0] for resampler in (by_axes, plain))
    assert one.isfinite().all()
    assert relative_error(one, other) < 1e-5 * max(1, loudness / 100)  # a score's last digit grows with it


@pytest.mark.parametrize("mode", ["module in bfloat16", "autocast"])
@pytest.mark.parametrize("changes", [{}, {"prior_form": "bias"}, NO_QUERIES], ids=str)
def test_bfloat16_stays_within_two_percent(mode, changes):
    """Outputs, gates and maps: 0.3 to 1.5% over seeds, where a number of bfloat16 has a rounding error of 0.4%."""
    resampler, x = make(scope_sigmas=[0.5, 1.5, None], **changes), features((8, 8))
    expected = by_reference(resampler, x, (8, 8), (4, 4))
    if mode == "module in bfloat16":
        resampler, x = resampler.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y, maps = resampler(x, (8, 8), (4, 4), output_scopes=True)
    assert y.dtype == torch.bfloat16
    for actual, wanted in zip((y, maps.weights_BSM, maps.attentions_BSMN), expected, strict=True):
        assert relative_error(actual, wanted) < 0.02


@pytest.mark.parametrize("width", [8, 16, 32, 64, 80, 128])
def test_attention_by_the_prior_alone_keeps_its_digits_in_bfloat16(width):
    """For every head width, not for powers of four alone."""
    layer = make(hidden_size=width, num_attention_heads=1, scope_sigmas=[0.5]).layers[0]
    geometry = make_geometry((24, 24), (12, 12), width, width, dtype=torch.bfloat16)
    query, key = torch.zeros(1, 1, 1, 144, width), torch.zeros(1, 1, 1, 576, width)
    with torch.no_grad():
        query, key = layer._with_prior_channels(query.bfloat16(), key.bfloat16(), geometry)
        attention = (query.float() @ key.float().mT * width**-0.5)[0, 0, 0].softmax(-1)
        gaussian = layer.prior(geometry, "bias")[0, 0].softmax(-1)
    assert (attention - gaussian).abs().sum(-1).max() < 1e-3


def test_one_global_scope_is_plain_cross_attention():
    resampler, x = make(scope_sigmas=[None], fusion="mean", patch_conv=False), features((4, 4))
    layer = resampler.layers[0]
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
        plain.in_proj_bias.copy_(torch.cat([layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias]))
        plain.out_proj.load_state_dict(layer.o_proj.state_dict())
        u = resampler.input_proj(resampler.input_norm(x))
        position, anchor = (
            torch.tensor(np.stack([reference_resampler.positions(p, 16) for p in reference_resampler.centres(grid)]))
            for grid in ((4, 4), (2, 3))
        )
        base = resampler.query_1DHW.flatten(2).mT  # its grid is the one asked for
        q = (base + anchor.float() + layer.scope_embedding_GD[0]).expand(2, -1, -1)
        z = plain(layer.query_norm(q), u + position.float(), u)[0] + q
        z = z + layer.ffn(layer.ffn_norm(z))
        expected = resampler.output_proj(resampler.output_norm(z))
        torch.testing.assert_close(resampler(x, (4, 4), (2, 3))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_scope_that_grows_becomes_the_global_one():
    wide, unbounded = make(scope_sigmas=[0.5, 1e6]), make(scope_sigmas=[0.5, None])
    unbounded.load_state_dict({n: t for n, t in wide.state_dict().items() if "sigma" not in n}, strict=False)
    x = features((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(wide(x, (4, 4), (2, 2))[0], unbounded(x, (4, 4), (2, 2))[0], rtol=1e-5, atol=1e-6)


def mass_outside_three_sigmas(sigma: float, patch_grid, token: int) -> tuple[float, float]:
    """Of a token of a 6 x 6 grid without content: in the resampler's map, and summed by hand."""
    resampler = make(scope_sigmas=[sigma], learn_scopes=False, tile_heads=False)
    with torch.no_grad():
        resampler.layers[0].q_proj.weight.zero_()
        resampler.layers[0].q_proj.bias.zero_()
        _, maps = resampler(features(patch_grid, batch=1), patch_grid, (6, 6), output_scopes=True)
    anchor = reference_resampler.centres((6, 6))[token]
    patches = reference_resampler.centres(patch_grid)
    squared = np.array([reference_resampler.squared_pitches(anchor, patch, (6, 6)) for patch in patches])
    gaussian, outside = np.exp(-squared / (2 * sigma**2)), squared > 9 * sigma**2
    in_map = maps.attentions_BSMN[0, 0, token][torch.tensor(outside)].sum().item()
    return in_map, gaussian[outside].sum() / gaussian.sum()


@pytest.mark.parametrize("token", [0, 14, 35])
@pytest.mark.parametrize(("sigma", "patch_grid"), [(0.5, (12, 12)), (0.8, (30, 18)), (0.3, (24, 24))])
def test_a_local_scope_puts_outside_three_sigmas_what_the_gaussian_says(sigma, patch_grid, token):
    in_map, by_hand = mass_outside_three_sigmas(sigma, patch_grid, token)
    assert in_map == pytest.approx(by_hand, rel=1e-4)


def test_over_many_patches_that_is_what_a_gaussian_in_the_plane_says():
    in_map, _ = mass_outside_three_sigmas(0.5, (96, 96), token=14)  # no border within five sigmas
    assert in_map == pytest.approx(math.exp(-9 / 2), rel=0.03)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("layout", ["branches", "heads"])
def test_the_heads_of_a_scope_share_it_out(heads, layout):
    """Around its centre, within its sigma, each half as wide, no two at the same place; a head that is alone has it."""
    share = heads if layout == "branches" else 3 * heads
    changes = {"num_attention_heads": share, "hidden_size": 4 * share, "scope_layout": layout, "fusion": "mean"}
    changes["scope_heads"] = None if layout == "branches" else [heads] * 3
    prior = ScopePrior(MSResamplerProjectorConfig(**SMALL | changes | {"scope_sigmas": [0.5, 2.0, None]}))
    sigma_Sh, offset_Sh2 = prior.sigma_Gh.view(3, heads), prior.offset_Gh2.view(3, heads, 2)
    for sigma_h, offset_h2, sigma in zip(sigma_Sh[:2], offset_Sh2[:2], (0.5, 2.0), strict=True):
        torch.testing.assert_close(offset_h2.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
        assert sigma_h.tolist() == [sigma if heads == 1 else sigma / 2] * heads
        assert offset_h2.norm(dim=-1).max() < 1.2 * sigma
        assert len(offset_h2.unique(dim=0)) == heads
    assert torch.isinf(sigma_Sh[2]).all()
    assert (offset_Sh2[2] == 0).all()


def test_tiles_cover_the_disc_evenly():
    points = tiles(400)
    assert points.norm(dim=-1).max().item() == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(points.T.cov(), 0.25 * torch.eye(2), rtol=0, atol=0.01)
    assert torch.cdist(points, points).fill_diagonal_(9).amin(1).min() > 0.5 * math.sqrt(math.pi / 400)


@pytest.mark.parametrize("side", [19, 27])
def test_a_window_is_the_same_disc_around_every_token(side):
    prior = make(scope_prior="window", scope_sigmas=[0.5]).layers[0].prior
    geometry = make_geometry((side, side), (side, side), 16, 4)
    seen_M = (prior(geometry, "bias")[0, 0] == 0).sum(-1).view(side, side)
    assert (seen_M[1:-1, 1:-1] == 5).all()  # the token's own patch and its four neighbours


@pytest.mark.parametrize("changes", ARRANGEMENTS[::2], ids=str)
def test_weights_and_maps_are_distributions(changes):
    with torch.no_grad():
        _, maps = make(**changes)(features((4, 6)), (4, 6), (2, 3), output_scopes=True)
    for distributions in (maps.weights_BSM.sum(1), maps.attentions_BSMN.sum(-1)):
        torch.testing.assert_close(distributions, torch.ones_like(distributions))
    assert maps.weights_BSM.min() >= 0 <= maps.attentions_BSMN.min()


@pytest.mark.parametrize("prior", ["gaussian", "window", "none"])
@pytest.mark.parametrize("form", ["channels", "bias"])
def test_maps_are_the_attention_that_was_paid(prior, form):
    """With one head, the values weighted by the map returned are what reached W_o."""
    resampler = make(num_attention_heads=1, fusion="token", scope_prior=prior, prior_form=form)
    seen = {}
    resampler.layers[0].v_proj.register_forward_hook(lambda _, __, value: seen.update(value=value))
    resampler.layers[0].o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(read=inputs[0]))
    with torch.no_grad():
        _, maps = resampler(features((4, 5)), (4, 5), (2, 3), output_scopes=True)
    torch.testing.assert_close(maps.attentions_BSMN @ seen["value"][:, None], seen["read"], rtol=1e-5, atol=1e-5)


def test_scopes_are_trusted_alike_before_training():
    resampler = MultiScopeResampler(MSResamplerProjectorConfig(**SMALL), VISION, TEXT).apply(init_resampler_weights)
    with torch.no_grad():
        y, maps = resampler(features((4, 4)), (4, 4), (2, 2), output_scopes=True)
    torch.testing.assert_close(maps.weights_BSM, torch.full((2, 3, 4), 1 / 3))
    assert 0.5 < y.std() < 2
    assert (maps.attentions_BSMN[:, 0] - maps.attentions_BSMN[:, 2]).abs().max() > 0.05


KINDS = [{}, {"query_init": "content"}, NO_QUERIES]


@given(*(st.tuples(st.integers(1, 9), st.integers(1, 9)) for _ in range(2)), st.sampled_from(KINDS))
def test_any_grids_with_one_set_of_weights(patch_grid, token_grid, changes):
    resampler, x = make(**changes), features(patch_grid)
    with torch.no_grad():
        y, maps = resampler(x, patch_grid, token_grid, output_scopes=True)
    assert y.shape == (2, math.prod(token_grid), TEXT)
    assert maps.attentions_BSMN.shape == (2, 3, math.prod(token_grid), math.prod(patch_grid))
    assert y.isfinite().all()


def test_without_queries_only_the_prior_tells_tokens_apart():
    """A global scope says the same to every token; a local one what it says to a token that stands where this one does.

    So a token of a grid is a token of any grid in whose units the patches around it lie as they do here.
    """
    changes = {**NO_QUERIES, "fusion": "mean", "scope_heads": [3, 1], "patch_conv": False}
    resampler, x = make(scope_sigmas=[0.5, None], **changes), features((6, 6))
    assert not [name for name, _ in resampler.named_parameters() if "query" in name or "k_proj" in name]
    with torch.no_grad():
        y, maps = resampler(x, (6, 6), (3, 3), output_scopes=True)
        assert torch.equal(maps.attentions_BSMN[:, 1, :1].expand(-1, 9, -1), maps.attentions_BSMN[:, 1])
        assert (y[:, 0] - y[:, 1]).abs().min(dim=0).values.max() > 1e-3
        # The same patches twice, side by side: six tokens in a row are those of the left half, twice.
        maps_twice = resampler(torch.cat([x.unflatten(1, (6, 6))] * 2, dim=2).flatten(1, 2), (6, 12), (3, 6), True)[1]
    far = maps_twice.attentions_BSMN[:, 0].unflatten(-1, (6, 12)).unflatten(1, (3, 6))
    torch.testing.assert_close(far[:, :, 4, :, 6:].sum((-2, -1)), torch.ones(2, 3), rtol=0, atol=0.2)
    here = maps.attentions_BSMN[:, 0].unflatten(-1, (6, 6)).unflatten(1, (3, 3))
    odds = far[:, :, 4, :, 6:] / far[:, :, 4, :, 6:].sum((-2, -1), keepdim=True)
    torch.testing.assert_close(odds, here[:, :, 1], rtol=1e-4, atol=1e-6)


def test_images_of_a_batch_do_not_mix():
    resampler, x = make(), features((4, 4), batch=3)
    with torch.no_grad():
        together = resampler(x, (4, 4), (2, 2))[0]
        alone = torch.cat([resampler(x[n : n + 1], (4, 4), (2, 2))[0] for n in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def by_scope(name: str, tensor: torch.Tensor, config, order: list[int]) -> torch.Tensor:
    """A parameter or buffer with its parts of the scopes in another order."""
    heads = config.scope_layout == "heads"
    if heads and name.endswith(("o_proj.weight", "_Gh", "_Gh2")):
        return tensor.unflatten(1, (3, -1))[:, order].flatten(1, 2)
    parts = ("q_proj", "k_proj", "v_proj") if heads else () if config.share_kv else ("k_proj", "v_proj")
    if any(part in name for part in parts):
        return tensor.unflatten(0, (3, -1))[order].flatten(0, 1)
    if name.endswith("gate_S") or (not heads and name.endswith(("_GD", "_Gh", "_Gh2"))):
        return tensor[order]
    return tensor


@pytest.mark.parametrize(
    "changes",
    [*({"fusion": f} for f in FUSIONS), {"share_kv": False}]
    + [{"scope_layout": "heads", "scope_heads": [2, 2, 2], "fusion": f} for f in ("static", "mean")],
    ids=str,
)
def test_the_order_of_the_scopes_does_not_matter(changes):
    changes = changes | {"hidden_size": 24, "num_attention_heads": 6}
    one = make(scope_sigmas=[0.5, 1.5, None], **changes)
    other = make(seed=1, scope_sigmas=[None, 0.5, 1.5], **changes)
    other.load_state_dict({n: by_scope(n, t, one.config, [2, 0, 1]) for n, t in one.state_dict().items()})
    x = features((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(one(x, (4, 4), (2, 2))[0], other(x, (4, 4), (2, 2))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_patches_become_a_map_without_a_copy(batch, dtype):
    """Channels last, for one image too, and with the values that a plain copy has after convolution and pooling."""
    x_BND = features((4, 6), batch).to(dtype)
    map_BDHW = as_map(x_BND, (4, 6))
    assert map_BDHW.data_ptr() == x_BND.data_ptr()
    plain_BDHW = torch.stack([x_BND[:, [6 * row + n for n in range(6)]].mT for row in range(4)], dim=2).contiguous()
    conv = nn.Conv2d(VISION, VISION, 3, padding=1, groups=VISION).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    with torch.no_grad():
        seen_BDHW = conv(map_BDHW)
        torch.testing.assert_close(seen_BDHW, conv(plain_BDHW), rtol=tolerance, atol=tolerance)
    assert seen_BDHW.permute(0, 2, 3, 1).is_contiguous()
    means_BMD = plain_BDHW.unflatten(2, (2, 2)).unflatten(4, (2, 3)).float().mean(dim=(3, 5)).flatten(2).mT
    torch.testing.assert_close(cell_means(x_BND, (4, 6), (2, 2)).float(), means_BMD, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (24, 24)])
def test_positions_of_a_grid_are_those_of_its_cells(grid, dtype):
    cells = cell_centres(grid, dtype=dtype)
    assert torch.equal(grid_positions(grid, 16, cells.device, dtype), sincos_positions(cells, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_geometry_of_two_grids_is_made_once(dtype):
    """And is the same as one that is made anew, whichever grids, widths and dtypes were asked for in between."""
    asked = [((4, 5), (2, 3), 16, 4), ((4, 5), (2, 2), 16, 4), ((4, 5), (2, 3), 32, 4), ((4, 5), (2, 3), 16, 8)]
    kept = [geometry_of(torch.zeros(1, 20, width, dtype=dtype), *grids, head) for *grids, width, head in asked]
    for one, (*grids, width, head) in zip(kept, asked, strict=True):
        again = geometry_of(torch.zeros(3, 20, width, dtype=dtype), *grids, head)
        assert all(part is same for part, same in zip(one, again, strict=True))
        made = make_geometry(*grids, width, head, dtype=dtype)
        assert one[:2] == made[:2] == tuple(grids)
        assert all(torch.equal(part, other) for part, other in zip(one[2:], made[2:], strict=True))
        points = make_geometry(*grids, width, None, dtype=dtype)  # all that tokens need which do not ask
        assert torch.equal(points.anchors_M2, made.anchors_M2)
        assert torch.equal(points.patches_N2, made.patches_N2)
        assert sum(part.numel() for part in points[4:]) == 0
        assert made.patch_codes_ND.dtype == made.channels_Ne.dtype == dtype
        assert (head + made.channels_Ne.shape[-1]) % 8 == 0


def test_geometry_that_was_first_needed_elsewhere_serves_training():
    """In inference mode, in a transformed function, or among tensors that hold no data."""
    resampler, x = make(), features((2, 9))

    def loss(x_BNC: torch.Tensor) -> torch.Tensor:
        return resampler(x_BNC, (2, 9), (1, 4))[0].square().sum()

    _kept_geometry.cache_clear()
    with FakeTensorMode():
        make()(torch.zeros(1, 18, VISION), (2, 9), (1, 4))
    assert _kept_geometry.cache_info().currsize == 0  # or what comes next would have no data either
    with torch.inference_mode():
        expected = loss(x)
    _kept_geometry.cache_clear()
    gradient = torch.func.grad(loss)(x)
    x.requires_grad_()
    torch.testing.assert_close(loss(x), expected)
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], gradient)
    _kept_geometry.cache_clear()
    with torch.inference_mode():
        loss(x)
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], gradient)


def test_a_wrong_number_of_features_is_named():
    with pytest.raises(ValueError, match="Got 15 patch features for a grid of 4 x 4 patches"):
        make()(features((3, 5)), (4, 4), (2, 2))


def test_parameters_and_buffers_survive_a_file(tmp_path):
    resampler = make()
    save_file(resampler.state_dict(), tmp_path / "weights.safetensors")
    other = make(seed=5)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert "layers.0.prior.sigma_Gh" in dict(other.named_buffers())
    assert torch.isinf(other.layers[0].prior.sigma_Gh[2]).all()
    x = features((4, 4))
    with torch.no_grad():
        assert torch.equal(resampler(x, (4, 4), (2, 2))[0], other(x, (4, 4), (2, 2))[0])


def test_initialisation_restores_the_scopes_from_garbage():
    resampler = make()
    wanted = MultiScopeResampler(resampler.config, VISION, TEXT).layers[0].prior
    resampler.layers[0].prior.sigma_Gh.fill_(float("nan"))
    resampler.apply(init_resampler_weights)
    assert torch.equal(resampler.layers[0].prior.sigma_Gh, wanted.sigma_Gh)
    assert torch.equal(resampler.layers[0].prior.offset_Gh2, wanted.offset_Gh2)
    assert torch.equal(resampler.layers[0].prior.log_scale_Gh, torch.zeros(3, 4))


def test_heads_are_shared_out_in_order():
    branches = make(scope_sigmas=[1, 2], tile_heads=False)
    assert branches.layers[0].prior.sigma_Gh.tolist() == [[1.0] * 4, [2.0] * 4]
    heads = make(scope_sigmas=[0.5, 2, None], scope_layout="heads", fusion="mean", tile_heads=False)
    assert heads.layers[0].prior.sigma_Gh.tolist() == [[0.5, 0.5, 2.0, math.inf]]
    asked = heads.config.to_dict() | {"scope_heads": [1, 1, 2]}
    asked = MultiScopeResampler(MSResamplerProjectorConfig(**asked), VISION, TEXT)
    assert asked.layers[0].prior.sigma_Gh.tolist() == [[0.5, 2.0, math.inf, math.inf]]
    by_width = {1024: (16, [12, 2, 2]), None: (12, [8, 2, 2]), 256: (4, [2, 1, 1])}  # a head for every 64 channels
    for width, shares in by_width.items():
        config = MSResamplerProjectorConfig(hidden_size=width)
        assert (config.num_attention_heads, config.scope_heads) == shares
        assert config.intermediate_size == config.hidden_size == (width or 768)
    assert MSResamplerProjectorConfig(projector_type="mqt").hidden_size == 1024


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        resampler = make(num_hidden_layers=2).train()
        for layer in resampler.layers:
            layer.gradient_checkpointing = checkpointing
            layer._gradient_checkpointing_func = lambda f, *args: torch.utils.checkpoint.checkpoint(
                f, *args, use_reentrant=False
            )
        resampler(features((4, 4)), (4, 4), (2, 2))[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in resampler.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("patch_grid", "token_grid"), GRIDS)
def test_beside_a_pooled_mlp_it_starts_as_that_mlp_and_everything_learns(patch_grid, token_grid):
    config = MSResamplerProjectorConfig(**SMALL, pooled_mlp=True)
    resampler = MultiScopeResampler(config, VISION, TEXT).apply(init_resampler_weights)
    x_BNC, tokens = features(patch_grid), math.prod(token_grid)
    cells = [
        [reference_resampler.cell_mean(x, patch_grid, token_grid, i) for i in range(tokens)] for x in x_BNC.numpy()
    ]
    y_BMT, _ = resampler(x_BNC, patch_grid, token_grid)
    torch.testing.assert_close(y_BMT, resampler.mlp(torch.tensor(np.array(cells))), rtol=1e-5, atol=1e-6)

    before = {name: parameter.detach().clone() for name, parameter in resampler.named_parameters()}
    optimizer = torch.optim.SGD(resampler.parameters(), lr=1.0)
    for _ in range(3):  # the output matrix, then what is before it, then what is before the gate, which starts at zero
        optimizer.zero_grad()
        (resampler(x_BNC, patch_grid, token_grid)[0] - 1).square().mean().backward()
        optimizer.step()
    still = {name for name, parameter in resampler.named_parameters() if (parameter - before[name]).norm() < 1e-6}
    assert still <= {f"layers.0.{name}.bias" for name in ("k_proj", "gate_norm")}  # a softmax ignores them
    scopes_moved = resampler.layers[0].scope_embedding_GD - before["layers.0.scope_embedding_GD"]
    assert scopes_moved.norm(dim=1).min() > 1e-4
