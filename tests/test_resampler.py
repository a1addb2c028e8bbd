"""The resampler against its equations: outputs, maps and gradients, in every arrangement."""

import math
from itertools import product

import numpy as np
import pytest
import reference_resampler
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ms_resampler import MSResamplerProjectorConfig
from ms_resampler.resampler_ms_resampler import MultiScopeResampler, cell_centres, init_resampler_weights

VISION, TEXT = 6, 10
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 12, "query_grid": [2, 3]}

FUSIONS = ("head", "token", "static", "mean")
ARRANGEMENTS = [
    *({"fusion": f, "scope_prior": p} for f, p in product(FUSIONS, ("gaussian", "window", "none"))),
    *({"scope_layout": "heads", "fusion": f} for f in ("token", "static", "mean")),
    {"scope_layout": "heads", "fusion": "mean", "scope_prior": "window"},
    {"share_kv": False},
    {"share_kv": False, "prior_form": "bias"},
    {"query_init": "content"},
    {"num_hidden_layers": 2, "query_init": "content"},
    {"learn_scopes": False},
    {"prior_form": "bias"},
    {"scope_sigmas": [None]},
    {"scope_sigmas": [0.3]},
    {"scope_sigmas": [0.4, 0.9, 2.0, None, None]},
]  # fmt: skip
GRIDS = [((4, 4), (2, 2)), ((3, 5), (2, 3)), ((5, 2), (3, 1)), ((4, 6), (4, 5)), ((1, 7), (1, 3))]


def make(seed: int = 0, **changes) -> MultiScopeResampler:
    """A small resampler whose every parameter matters."""
    config = MSResamplerProjectorConfig(**SMALL | changes)
    torch.manual_seed(seed)
    resampler = MultiScopeResampler(config, VISION, TEXT)
    for module in resampler.modules():
        init_resampler_weights(module)
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


def test_random_arrangements():
    rng = np.random.default_rng(0)
    for number in range(12):
        scopes = [None if rng.random() < 0.3 else float(rng.uniform(0.2, 3)) for _ in range(rng.integers(1, 5))]
        patch_grid, token_grid = (tuple(int(n) for n in rng.integers(1, 6, 2)) for _ in range(2))
        resampler, x = make(number, scope_sigmas=scopes), features(patch_grid, batch=1)
        with torch.no_grad():
            y, _ = resampler(x, patch_grid, token_grid)
        assert relative_error(y, by_reference(resampler, x, patch_grid, token_grid)[0]) < 1e-5, (scopes, patch_grid)


@pytest.mark.parametrize(("patch_grid", "token_grid"), GRIDS)
@pytest.mark.parametrize("changes", [{}, {"scope_layout": "heads", "fusion": "token"}, {"share_kv": False}], ids=str)
def test_both_forms_of_the_prior_agree_gradients_included(patch_grid, token_grid, changes):
    channels, bias = make(prior_form="channels", **changes), make(prior_form="bias", **changes)
    bias.load_state_dict(channels.state_dict())
    gradients = []
    for resampler in (channels, bias):
        x = features(patch_grid).requires_grad_()
        y, _ = resampler(x, patch_grid, token_grid)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients.append({"x": x.grad, "y": y.detach()} | {n: p.grad for n, p in resampler.named_parameters()})
    for name, expected in gradients[1].items():
        error = (gradients[0][name] - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < 1e-4, (name, error)


def test_gradients_are_those_of_finite_differences():
    resampler, x = make(scope_sigmas=[0.5, None]).double(), features((3, 3), batch=1).double()
    direction = {n: torch.randn_like(p) for n, p in resampler.named_parameters()}

    def loss_at(step: float) -> torch.Tensor:
        moved = {n: p + step * direction[n] for n, p in resampler.named_parameters()}
        return torch.func.functional_call(resampler, moved, (x, (3, 3), (2, 2)))[0].square().sum()

    loss = resampler(x, (3, 3), (2, 2))[0].square().sum()
    loss.backward()
    slope = sum((p.grad * direction[n]).sum() for n, p in resampler.named_parameters()).item()
    numeric = ((loss_at(1e-4) - loss_at(-1e-4)) / 2e-4).item()
    assert slope == pytest.approx(numeric, rel=1e-3)
    assert resampler.layers[0].prior.log_scale_Gh.grad[0].abs().min() > 0
    assert resampler.layers[0].prior.log_scale_Gh.grad[1].abs().max() == 0  # a global scope has no size to learn


@pytest.mark.parametrize("mode", ["module in bfloat16", "autocast"])
@pytest.mark.parametrize("form", ["channels", "bias"])
def test_bfloat16_stays_within_three_percent(mode, form):
    resampler, x = make(prior_form=form), features((8, 8))
    expected = by_reference(resampler, x, (8, 8), (4, 4))[0]
    if mode == "autocast":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y, _ = resampler(x, (8, 8), (4, 4))
    else:
        with torch.no_grad():
            y, _ = resampler.to(torch.bfloat16)(x.to(torch.bfloat16), (8, 8), (4, 4))
    assert relative_error(y.float(), expected) < 0.03


def test_the_prior_in_bfloat16_channels_keeps_its_digits():
    """At 24 x 24 patches a prior in plain bfloat16 would be off by whole units; split in two it is not."""
    prior = make(scope_sigmas=[0.5]).layers[0].prior
    anchors, patches = cell_centres((12, 12)) * 12, cell_centres((24, 24)) * 12
    query, key = prior.channels(anchors, patches, torch.bfloat16)
    scores = query.float()[0, 0] @ key.float().T
    exact = prior.bias_GhMN(anchors, patches)[0, 0]
    near = exact > -8  # beyond it a patch has no weight
    shift = (scores - exact)[:, :1] * 0 + (scores - exact).gather(1, exact.argmax(1, keepdim=True))
    assert ((scores - exact - shift)[near]).abs().max() < 0.05


def test_one_global_scope_is_plain_cross_attention():
    resampler, x = make(scope_sigmas=[None], fusion="mean"), features((4, 4))
    layer = resampler.layers[0]
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
        plain.in_proj_bias.copy_(torch.cat([layer.q_proj.bias, layer.k_proj.bias, layer.v_proj.bias]))
        plain.out_proj.load_state_dict(layer.o_proj.state_dict())
        u = resampler.input_proj(resampler.input_norm(x))
        position = torch.tensor(
            np.stack([reference_resampler.positions(p, 16) for p in reference_resampler.centres((4, 4))])
        )
        q = resampler._first_queries(u, (4, 4), (2, 2)) + layer.scope_embedding_GD[0]
        z = plain(layer.query_norm(q), u + position.float(), u)[0] + q
        z = z + layer.ffn(layer.ffn_norm(z))
        expected = resampler.output_proj(resampler.output_norm(z))
        torch.testing.assert_close(resampler(x, (4, 4), (2, 2))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_scope_that_grows_becomes_the_global_one():
    wide, unbounded = make(scope_sigmas=[0.5, 1e6]), make(scope_sigmas=[0.5, None])
    unbounded.load_state_dict({n: t for n, t in wide.state_dict().items() if "sigma" not in n}, strict=False)
    x = features((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(wide(x, (4, 4), (2, 2))[0], unbounded(x, (4, 4), (2, 2))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 0.8])
def test_a_local_scope_puts_outside_three_sigmas_what_the_gaussian_says(sigma):
    """Without content the attention is the Gaussian itself; in two dimensions exp(-9/2) of it lies outside."""
    resampler = make(scope_sigmas=[sigma], learn_scopes=False)
    with torch.no_grad():
        resampler.layers[0].q_proj.weight.zero_()
        resampler.layers[0].q_proj.bias.zero_()
        _, maps = resampler(features((48, 48), batch=1), (48, 48), (6, 6), output_scopes=True)
    anchors, patches = cell_centres((6, 6)) * 6, cell_centres((48, 48)) * 6
    middle = 2 * 6 + 2  # a token whose scope does not reach the border
    distance = (anchors[middle] - patches).norm(dim=-1)
    gaussian = torch.exp(-(distance**2) / (2 * sigma**2))
    expected = gaussian[distance > 3 * sigma].sum() / gaussian.sum()
    outside = maps.attentions_BSMN[0, 0, middle][distance > 3 * sigma].sum()
    assert outside == pytest.approx(expected.item(), rel=1e-4)
    assert outside == pytest.approx(math.exp(-4.5), rel=0.5 if sigma > 0.5 else 0.15)


def test_weights_and_maps_are_distributions():
    with torch.no_grad():
        _, maps = make()(features((4, 6)), (4, 6), (2, 3), output_scopes=True)
    torch.testing.assert_close(maps.weights_BSM.sum(1), torch.ones(2, 6))
    torch.testing.assert_close(maps.attentions_BSMN.sum(-1), torch.ones(2, 3, 6))
    assert maps.weights_BSM.std() > 0


def test_images_of_a_batch_do_not_mix():
    resampler, x = make(), features((4, 4), batch=3)
    with torch.no_grad():
        together = resampler(x, (4, 4), (2, 2))[0]
        alone = torch.cat([resampler(x[n : n + 1], (4, 4), (2, 2))[0] for n in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_order_of_the_scopes_does_not_matter():
    one, other = make(scope_sigmas=[0.5, 1.5, None]), make(scope_sigmas=[None, 0.5, 1.5])
    order = [2, 0, 1]
    state = {n: t[order] if n.endswith(("_GD", "_Gh")) else t for n, t in one.state_dict().items()}
    other.load_state_dict(state)
    x = features((4, 4))
    with torch.no_grad():
        torch.testing.assert_close(one(x, (4, 4), (2, 2))[0], other(x, (4, 4), (2, 2))[0], rtol=1e-4, atol=1e-5)


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
    wanted = resampler.layers[0].prior.sigma_Gh.clone()
    resampler.layers[0].prior.sigma_Gh.fill_(float("nan"))
    for module in resampler.modules():
        init_resampler_weights(module)
    assert torch.equal(resampler.layers[0].prior.sigma_Gh, wanted)
    assert torch.equal(resampler.layers[0].prior.log_scale_Gh, torch.zeros(3, 4))


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
