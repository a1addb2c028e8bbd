"""The resampler against its equations: outputs, maps and gradients of the default, and of its two kin with queries."""

import math

import numpy as np
import pytest
import reference_resampler
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from ms_resampler import MSResamplerProjectorConfig
from ms_resampler.branches_ms_resampler import BranchPrior
from ms_resampler.places_ms_resampler import GLOBAL, as_map, cell_means, spread
from ms_resampler.projectors_ms_resampler import SCOPED_PROJECTORS, init_projector_weights
from ms_resampler.resampler_ms_resampler import init_resampler_weights

VISION, TEXT = 6, 10
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 12, "query_grid": [2, 3]}
DEFAULT: dict = {}
BRANCHES = {"projector_type": "ms_resampler_branches"}
RESAMPLER = {"projector_type": "resampler"}
EMBEDDED = BRANCHES | {
    "branch_form": {"fusion": "head", "patch_conv": False, "tile_heads": False, "cell_residual": False}
}
STATIC = BRANCHES | {"branch_form": {"fusion": "static"}}
MOVING = {"moving_scopes": True}
KINDS = [DEFAULT, MOVING, BRANCHES, RESAMPLER, EMBEDDED, STATIC]
ARRANGEMENTS = [
    *KINDS,
    *(kind | {"num_hidden_layers": 2, "scope_sigmas": [0.5, None]} for kind in (DEFAULT, BRANCHES)),
    *(kind | {"scope_sigmas": [0.3]} for kind in (DEFAULT, RESAMPLER)),
    *(kind | {"pooled_mlp": True} for kind in (DEFAULT, MOVING, BRANCHES)),
    MOVING | {"num_hidden_layers": 3, "scope_sigmas": [None, 0.7]},
    {"scope_heads": [1, 1, 2]},
    *(kind | {"scope_sigmas": [0.5, 1e6]} for kind in (DEFAULT, BRANCHES)),  # nearly global
    {"scope_sigmas": [0.3, None, 1, 3]},
    {"hidden_size": 4, "num_attention_heads": 1, "scope_sigmas": [0.5]},
    BRANCHES | {"scope_sigmas": [0.4, 0.9, 2, None, None]},
    BRANCHES | {"branch_form": {"fusion": "head", "cell_residual": False}, "num_hidden_layers": 2},
    RESAMPLER | {"branch_form": {"patch_conv": False, "cell_residual": False}},
]
GRIDS = [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((5, 2), (3, 1)), ((4, 6), (4, 5)), ((1, 7), (1, 3))]


def initialise(module: nn.Module) -> None:
    init_resampler_weights(module)
    init_projector_weights(module)


def fresh(**changes) -> nn.Module:
    """A small resampler as it starts."""
    config = MSResamplerProjectorConfig(**SMALL | changes)
    return SCOPED_PROJECTORS[config.projector_type](config, VISION, TEXT).apply(initialise)


def make(seed: int = 0, **changes) -> nn.Module:
    """A small resampler whose every parameter matters."""
    torch.manual_seed(seed)
    resampler = fresh(**changes)
    with torch.no_grad():
        for parameter in resampler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return resampler


def features(patch_grid, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, math.prod(patch_grid), VISION, generator=torch.Generator().manual_seed(seed))


def relative_error(actual, expected) -> float:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


def by_reference(resampler, x, patch_grid, token_grid, **variant):
    """Outputs, weights and maps of a resampler or a variant of it, in loops."""
    weights = {name: tensor.double().numpy() for name, tensor in resampler.state_dict().items()}
    described = reference_resampler.described(resampler.config, **variant)
    return reference_resampler.resample(weights, described, x.double().numpy(), patch_grid, token_grid)


def assert_is_the_reference(resampler, x, patch_grid, token_grid, tolerance: float, **variant) -> None:
    with torch.no_grad():
        y, maps = resampler(x, patch_grid, token_grid, output_scopes=True)
        assert torch.equal(resampler(x, patch_grid, token_grid)[0], y)
    expected = by_reference(resampler, x, patch_grid, token_grid, **variant)
    for actual, wanted in zip((y, maps.weights_BSM, maps.attentions_BSMN), expected, strict=True):
        assert tuple(actual.shape) == wanted.shape
        assert relative_error(actual, wanted) < tolerance, (patch_grid, token_grid)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("changes", ARRANGEMENTS, ids=str)
def test_outputs_and_maps_are_those_of_the_equations(changes, dtype, tolerance):
    for number, grids in enumerate(GRIDS[:3]):
        resampler, x = make(number, **changes).to(dtype), features(grids[0]).to(dtype)
        assert_is_the_reference(resampler, x, *grids, tolerance)


def test_random_scopes_and_grids():
    rng = np.random.default_rng(0)
    for number in range(12):
        scopes = [0.7, *(None if rng.random() < 0.3 else float(rng.uniform(0.2, 3)) for _ in range(rng.integers(4)))]
        grids = [tuple(int(n) for n in rng.integers(1, 6, 2)) for _ in range(2)]
        for kind in (DEFAULT, BRANCHES):
            assert_is_the_reference(make(number, scope_sigmas=scopes, **kind), features(grids[0], 1), *grids, 1e-5)


@given(
    *(st.tuples(st.integers(1, 9), st.integers(1, 9)) for _ in range(2)), st.sampled_from([DEFAULT, MOVING, BRANCHES])
)
def test_any_grids_with_one_set_of_weights(patch_grid, token_grid, changes):
    with torch.no_grad():
        y, maps = make(**changes)(features(patch_grid), patch_grid, token_grid, output_scopes=True)
    assert y.shape == (2, math.prod(token_grid), TEXT)
    assert maps.attentions_BSMN.shape == (2, 3, math.prod(token_grid), math.prod(patch_grid))
    assert y.isfinite().all()


def check_gradients(resampler, *inputs) -> None:
    """Gradients of every parameter, against finite differences in a random direction."""

    def loss_with(moved: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(resampler, moved, inputs)[0].square().sum()

    loss_with({}).backward()
    for name, parameter in resampler.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            ahead, behind = (loss_with({name: parameter + step * direction}).item() for step in (1e-5, -1e-5))
        slope = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("changes", [*KINDS, {"num_hidden_layers": 2, "pooled_mlp": True}], ids=str)
def test_gradients_are_those_of_finite_differences(changes):
    resampler, x = make(**changes).double(), features((3, 3), batch=1).double()

    check_gradients(resampler, x, (3, 3), (2, 2))


@pytest.mark.parametrize("changes", [DEFAULT, BRANCHES], ids=str)
def test_only_a_scope_that_ends_has_a_size_to_learn(changes):
    resampler = make(scope_sigmas=[0.5, None], **changes)
    resampler(features((3, 3)), (3, 3), (2, 2))[0].square().sum().backward()
    prior = resampler.layers[0].prior
    gradient = prior.log_scale.grad
    assert gradient[prior.sigma < GLOBAL].abs().min() > 0
    assert gradient[prior.sigma == GLOBAL].abs().max() == 0


@pytest.mark.parametrize("loudness", [1, 100, 1e4])
def test_filtering_by_rows_and_columns_holds_whatever_the_scores(loudness):
    """Even where the loudest patch is so far above the others that no number holds its exponential beside theirs."""
    resampler, x = make(), features((5, 7))
    with torch.no_grad():
        resampler.layers[0].score[2].weight *= loudness
    assert_is_the_reference(resampler, x, (5, 7), (3, 2), 1e-5 * max(1, loudness / 100))  # a score's last digit grows


@pytest.mark.parametrize("mode", ["module in bfloat16", "autocast"])
@pytest.mark.parametrize("changes", [DEFAULT, MOVING, BRANCHES, EMBEDDED], ids=str)
def test_bfloat16_stays_within_two_percent(mode, changes):
    """Outputs, gates and maps: 0.3 to 1.5% over seeds, where a number of bfloat16 has a rounding error of 0.4%."""
    resampler, x = make(**changes), features((8, 8))
    expected = by_reference(resampler, x, (8, 8), (4, 4))
    if mode == "module in bfloat16":
        resampler, x = resampler.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        y, maps = resampler(x, (8, 8), (4, 4), output_scopes=True)
    assert y.dtype == torch.bfloat16
    for actual, wanted in zip((y, maps.weights_BSM, maps.attentions_BSMN), expected, strict=True):
        assert relative_error(actual, wanted) < 0.02


@pytest.mark.parametrize("width", [8, 16, 32, 64, 80, 128])
def test_a_prior_in_channels_keeps_its_digits_in_bfloat16(width):
    """For every head width, not for powers of four alone."""
    sizes = {"hidden_size": width, "num_attention_heads": 1, "scope_sigmas": [0.5]}
    prior = BranchPrior(MSResamplerProjectorConfig(**SMALL | BRANCHES | sizes))
    query, key = prior((24, 24), (12, 12), torch.zeros(1, dtype=torch.bfloat16))
    assert (width + key.shape[-1]) % 8 == 0
    attention = (query[0, 0].float() @ key.float().mT * width**-0.5).softmax(-1).double().detach()
    patches, anchors = (reference_resampler.centres(grid) for grid in ((24, 24), (12, 12)))
    squared = [[reference_resampler.squared_pitches(a, p, (12, 12)) for p in patches] for a in anchors]
    gaussian = (-2 * torch.tensor(squared, dtype=torch.float64)).softmax(-1)
    assert (attention - gaussian).abs().sum(-1).max() < 1e-3


def test_a_local_scope_has_outside_three_sigmas_what_a_gaussian_has():
    resampler, grid, token = fresh(scope_sigmas=[0.5], num_attention_heads=1), (96, 96), 14  # far from every border
    with torch.no_grad():
        resampler.layers[0].score[2].weight.zero_()
        _, maps = resampler(features(grid, batch=1), grid, (6, 6), output_scopes=True)
    anchor, patches = reference_resampler.centres((6, 6))[token], reference_resampler.centres(grid)
    squared = torch.tensor([reference_resampler.squared_pitches(anchor, patch, (6, 6)) for patch in patches])
    outside = maps.attentions_BSMN[0, 0, token][squared > 9 * 0.5**2].sum().item()
    assert outside == pytest.approx(math.exp(-9 / 2), rel=0.03)


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_heads_of_a_scope_share_it(heads, sigma):
    """Around its centre, within its sigma, each half as wide, no two at the same place; a single head has all of it."""
    sigma_h, offset_h2 = spread(sigma, heads)
    torch.testing.assert_close(offset_h2.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    assert sigma_h.tolist() == [sigma if heads == 1 else sigma / 2] * heads
    assert offset_h2.norm(dim=-1).max() < 1.2 * sigma
    assert len(offset_h2.unique(dim=0)) == heads
    sigma_h, offset_h2 = spread(None, heads)
    assert (sigma_h == GLOBAL).all()
    assert not offset_h2.any()


def test_many_heads_cover_the_disc_evenly():
    points = spread(1.0, 400)[1]
    assert points.norm(dim=-1).max().item() == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(points.T.cov(), 0.25 * torch.eye(2), rtol=0, atol=0.01)
    assert torch.cdist(points, points).fill_diagonal_(9).amin(1).min() > 0.5 * math.sqrt(math.pi / 400)


def test_scopes_start_as_configured():
    default = fresh(num_attention_heads=8, scope_sigmas=[0.5, 2, None], scope_heads=[4, 3, 1]).layers[0].prior
    assert torch.equal(default.sigma, torch.tensor([[0.25] * 4 + [1.0] * 3 + [GLOBAL]]))
    torch.testing.assert_close(default.offset[0, :4], 0.5 * spread(1.0, 4)[1])
    assert fresh(**BRANCHES, scope_sigmas=[1, 2]).layers[0].prior.sigma.tolist() == [[0.5] * 4, [1.0] * 4]
    alike = fresh(**EMBEDDED, scope_sigmas=[1, None]).layers[0].prior
    assert torch.equal(alike.sigma, torch.tensor([[1.0] * 4, [GLOBAL] * 4]))
    assert "offset" not in alike.state_dict()


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_initialisation_restores_what_is_garbage(changes):
    resampler = fresh(**changes)
    for tensor in resampler.state_dict().values():
        tensor.fill_(math.nan)
    resampler.apply(initialise)
    prior, wanted = resampler.layers[0].prior, fresh(**changes).layers[0].prior
    assert all(torch.equal(prior.state_dict()[name], value) for name, value in wanted.state_dict().items())
    with torch.no_grad():
        y, maps = resampler(features((4, 4)), (4, 4), (2, 2), output_scopes=True)
    scopes = resampler.config.num_scopes
    torch.testing.assert_close(maps.weights_BSM, torch.full((2, scopes, 4), 1 / scopes))  # trusted alike
    assert 0.3 < y.std() < 3


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


@pytest.mark.parametrize("changes", [DEFAULT, MOVING, BRANCHES], ids=str)
def test_nothing_stays_from_calls_in_other_modes(changes):
    """In inference mode, in a transformed function, or among tensors that hold no data: training comes after."""
    resampler, x = make(**changes), features((2, 9))

    def loss(x_BNC: torch.Tensor) -> torch.Tensor:
        return resampler(x_BNC, (2, 9), (1, 4))[0].square().sum()

    with FakeTensorMode():
        make(**changes)(torch.zeros(1, 18, VISION), (2, 9), (1, 4))
    with torch.inference_mode():
        expected = loss(x)
    gradient = torch.func.grad(loss)(x)
    x.requires_grad_()
    torch.testing.assert_close(loss(x), expected)
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], gradient)


@pytest.mark.parametrize("changes", [DEFAULT, MOVING, BRANCHES, STATIC], ids=str)
def test_parameters_are_used_in_the_module_that_has_them(changes):
    """Offloaded weights are there only while their module is called, and 8-bit ones are changed then."""
    resampler, x = make(**changes), features((4, 4))
    with torch.no_grad():
        expected = resampler(x, (4, 4), (2, 2), output_scopes=True)[0]
        for module in resampler.modules():
            own = dict(module.named_parameters(recurse=False))
            kept = {name: parameter.data.clone() for name, parameter in own.items()}

            def put_back(module, inputs, kept=kept, own=own):
                for name, parameter in own.items():
                    parameter.data.copy_(kept[name])

            def take_away(module, inputs, outputs, own=own):
                for parameter in own.values():
                    parameter.data.fill_(math.nan)

            module.register_forward_pre_hook(put_back)
            module.register_forward_hook(take_away)
            take_away(module, (), ())
        assert torch.equal(resampler(x, (4, 4), (2, 2), output_scopes=True)[0], expected)


@pytest.mark.parametrize("changes", [DEFAULT, MOVING, BRANCHES], ids=str)
def test_it_is_compiled_as_one_graph_and_exported(changes):
    resampler, x = make(**changes).eval(), features((4, 6))
    with torch.no_grad():
        expected = resampler(x, (4, 6), (2, 3))[0]
        compiled = torch.compile(resampler, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, (4, 6), (2, 3))[0], expected)
        exported = torch.export.export(resampler, (x, (4, 6), (2, 3)))
        torch.testing.assert_close(exported.module()(x, (4, 6), (2, 3))[0], expected)


def test_a_wrong_number_of_features_is_named():
    with pytest.raises(ValueError, match="Got 15 patch features for a grid of 4 x 4 patches"):
        make()(features((3, 5)), (4, 4), (2, 2))


@pytest.mark.parametrize("changes", [DEFAULT, BRANCHES], ids=str)
@pytest.mark.parametrize(("patch_grid", "token_grid"), GRIDS)
def test_beside_a_pooled_mlp_it_starts_as_that_mlp_and_everything_learns(patch_grid, token_grid, changes):
    torch.manual_seed(0)
    resampler = fresh(pooled_mlp=True, **changes)
    x_BNC, tokens = features(patch_grid), math.prod(token_grid)
    cells = [
        [reference_resampler.cell_shares(patch_grid, token_grid, i) @ x for i in range(tokens)] for x in x_BNC.numpy()
    ]
    y_BMT, _ = resampler(x_BNC, patch_grid, token_grid)
    torch.testing.assert_close(
        y_BMT, resampler.mlp(torch.tensor(np.array(cells), dtype=torch.float32)), rtol=1e-5, atol=1e-6
    )

    before = {name: parameter.detach().clone() for name, parameter in resampler.named_parameters()}
    optimizer = torch.optim.SGD(resampler.parameters(), lr=1.0)
    for _ in range(3):  # the output matrix, then what is before it, then what is before the gate, which starts at zero
        optimizer.zero_grad()
        (resampler(x_BNC, patch_grid, token_grid)[0] - 1).square().mean().backward()
        optimizer.step()
    still = {name for name, parameter in resampler.named_parameters() if (parameter - before[name]).norm() < 1e-7}
    assert still <= {f"layers.0.{name}.bias" for name in ("k_proj", "gate_norm", "score.2")}  # softmax ignores them
