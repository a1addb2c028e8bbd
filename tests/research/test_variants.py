"""The study's variants against the same equations as the default, and the names under which results are stored."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from test_resampler import GRIDS, SMALL, TEXT, VISION, assert_is_the_reference, features, initialise, make

from ms_resampler.projectors_ms_resampler import SCOPED_PROJECTORS
from research.study.plan import ABLATIONS, PEERS, fields_of
from research.variants import complete_fields, configuration, window_bias

RESULTS = Path(__file__).parent.parent.parent / "research" / "results"
# What the reference reads: stored fields but for those that are fields today.
DESCRIBED = ("scope_prior", "learn_scopes", "tile_heads", "scope_layout", "fusion", "share_kv", "patch_conv")
DESCRIBED += ("cell_residual", "query_init")
ARMS = [arm for arm in (*PEERS, *ABLATIONS) if fields_of(arm).get("projector_type", "resampler") == "resampler"]
ARMS += [arm for arm in ABLATIONS if arm not in ARMS]
BIAS = {
    "bias": {"prior_form": "bias"},
    "bias, learned queries": {"prior_form": "bias", "query_init": "learned"},
    "bias, branches": {"prior_form": "bias", "query_init": "learned", "scope_layout": "branches"},
}


def make_variant(fields: dict, seed: int = 0) -> tuple[torch.nn.Module, dict]:
    """A small projector of stored fields whose every parameter matters, and the fields in full."""
    small = SMALL | {"hidden_size": 16} | {name: value for name, value in fields.items() if "size" not in name}
    config = configuration(small | {"scope_heads": None})
    torch.manual_seed(seed)
    variant = SCOPED_PROJECTORS[config.projector_type](config, VISION, TEXT).apply(initialise)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return variant.double(), complete_fields(small | {"scope_heads": None})


@pytest.mark.parametrize("name", [*ARMS, *BIAS])
def test_a_variant_is_what_its_fields_say(name):
    """Outputs, weights and maps, in float64; that of the bias form is the same function as that of the channels."""
    for number, grids in enumerate(GRIDS[:2]):
        variant, fields = make_variant(BIAS.get(name) or fields_of(name), number)
        told = {field: fields[field] for field in DESCRIBED}
        if len(fields["scope_sigmas"]) == 1 and fields["query_init"] != "none":
            told["scope_layout"] = "branches"  # one scope has all heads, and is described as it is shipped
        assert_is_the_reference(variant, features(grids[0]).double(), *grids, 1e-12, **told)


@pytest.mark.parametrize("name", ["bias", "bias, branches"])
def test_a_bias_has_the_gradients_of_rows_and_columns_or_channels(name):
    plain, _ = make_variant(BIAS[name])
    shipped = make(**{"projector_type": "ms_resampler_branches"} if "branches" in name else {}).double()
    shipped.load_state_dict(plain.state_dict())
    gradients = []
    for resampler in (plain, shipped):
        x = features((3, 5)).double().requires_grad_()
        y, _ = resampler(x, (3, 5), (2, 3))
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        gradients.append({"x": x.grad} | {name: p.grad for name, p in resampler.named_parameters()})
    loudest = max(gradient.norm() for gradient in gradients[1].values())
    for key, expected in gradients[1].items():
        error = (gradients[0][key] - expected).norm() / expected.norm().clamp(min=1e-2 * loudest)
        assert error < 1e-12, key


@pytest.mark.parametrize("side", [19, 27])
def test_a_window_is_the_same_disc_around_every_token(side):
    variant, _ = make_variant({"scope_prior": "window", "learn_scopes": False, "prior_form": "bias"})
    bias = window_bias(variant.layers[0].prior, (side, side), (side, side), torch.zeros(1))
    seen_M = (bias[0, 0] == 0).sum(-1).view(side, side)
    assert (seen_M[1:-1, 1:-1] == 5).all()  # the token's own patch and its four neighbours


@pytest.mark.parametrize(("name", "learned"), [("fixed sigmas", set()), ("heads all alike", {"log_scale"})])
def test_what_is_not_learned_is_no_parameter(name, learned):
    prior = make_variant(fields_of(name))[0].layers[0].prior
    assert {parameter for parameter, _ in prior.named_parameters()} == learned


def test_stored_results_are_named_by_all_their_fields():
    """Or they would be trained anew; a field's value may be what another name means today."""
    stored = next(file for file in (RESULTS / "runs.jsonl.gz", RESULTS / "runs.jsonl") if file.exists())
    text = gzip.decompress(stored.read_bytes()).decode() if stored.suffix == ".gz" else stored.read_text()
    projectors = [json.loads(line)["run"]["projector"] for line in text.splitlines()]
    assert len(projectors) > 500
    for projector in projectors:
        assert json.dumps(complete_fields(projector)) == json.dumps(projector)
