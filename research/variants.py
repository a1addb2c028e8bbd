"""The study's variants of the resamplers: each changes one thing, and is registered as a projector type on first use.

A variant is named by fields that earlier versions of the package had (`DEFAULTS`), under which the study's results are
stored: `configuration` translates them to a shipped projector or a variant. Shapes are named as in
ms_resampler/resampler_ms_resampler.py; G is the number of query sets: one where scopes share the heads, else S.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ms_resampler import MSResamplerProjectorConfig
from ms_resampler.branches_ms_resampler import (
    BranchesResampler,
    BranchLayer,
    BranchPrior,
    merge_heads,
    split_heads,
)
from ms_resampler.configuration_ms_resampler import PROJECTOR_TYPES
from ms_resampler.places_ms_resampler import Grid, LinearFromZero, MovingSpace, centres, spread
from ms_resampler.projectors_ms_resampler import register_projector
from ms_resampler.resampler_ms_resampler import MeanOverHeads, MultiScopeResampler, ScopeLayer, ScopePrior

# The base class of changes, which `variant` combines with others; untyped, since the result is unknown here.
Change: Any = object
# Former fields and their defaults, in the order of the stored results.
DEFAULTS: dict[str, Any] = {
    "scope_prior": "gaussian",
    "learn_scopes": True,
    "tile_heads": True,
    "scope_layout": "heads",
    "scope_heads": None,
    "fusion": "token",
    "share_kv": True,
    "patch_conv": True,
    "cell_residual": True,
    "pooled_mlp": False,
    "query_init": None,
    "prior_form": "channels",
}


def complete_fields(projector: dict[str, Any]) -> dict[str, Any]:
    """A projector's fields with all defaults, as stored with results; a peer's fields unchanged."""
    kind = projector.get("projector_type", "ms_resampler")
    if PROJECTOR_TYPES[kind] == "peer":
        return projector
    chosen = {**DEFAULTS, **projector}
    if chosen["query_init"] is None:
        alone = kind == "ms_resampler" and chosen["scope_layout"] == "heads" and chosen["scope_prior"] != "none"
        chosen["query_init"] = "none" if alone else "learned"
    config: Any = MSResamplerProjectorConfig(
        **{name: value for name, value in projector.items() if name not in {*DEFAULTS, "told"}}
        | {"projector_type": kind, "scope_heads": None if kind == "resampler" else projector.get("scope_heads")}
    )
    if chosen["scope_layout"] == "heads":
        chosen["scope_heads"] = config.scope_heads or [config.num_attention_heads]
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    first = {name: getattr(config, name) for name in (*sizes, "query_grid", "visual_tokens", "scope_sigmas")}
    second = {name: chosen[name] for name in DEFAULTS}
    later = {name: True for name in ("moving_scopes", "told") if projector.get(name)}  # than most stored results
    return {"projector_type": kind, **first, **second, "layer_norm_eps": config.layer_norm_eps, **later}


def configuration(projector: dict[str, Any]) -> MSResamplerProjectorConfig:
    """Today's configuration of a projector with these stored fields."""
    if PROJECTOR_TYPES[projector.get("projector_type", "ms_resampler")] == "peer":
        return MSResamplerProjectorConfig(**projector)
    fields = complete_fields(projector)
    if is_shipped(fields):
        return MSResamplerProjectorConfig.from_dict(fields)
    changes = {name: fields[name] for name in DEFAULTS if fields[name] != DEFAULTS[name] and name != "scope_heads"}
    name = "study: " + ", ".join(f"{name} {value}" for name, value in changes.items())
    if name not in PROJECTOR_TYPES:
        like = "ms_resampler_branches" if fields["query_init"] != "none" and is_separate(fields) else "ms_resampler"
        register_projector(name, variant(fields), like)
    today = {name: value for name, value in fields.items() if name not in DEFAULTS} | {"projector_type": name}
    if PROJECTOR_TYPES[name] == "ms_resampler":
        today["scope_heads"] = fields["scope_heads"]
    return MSResamplerProjectorConfig(**today, pooled_mlp=fields["pooled_mlp"])


def is_separate(fields: dict[str, Any]) -> bool:
    """Whether every scope has all heads, as a single one always has."""
    return fields["scope_layout"] == "branches" or len(fields["scope_sigmas"]) == 1


def is_shipped(fields: dict[str, Any]) -> bool:
    """Whether the package has a projector with these stored fields."""
    kept = [name for name in DEFAULTS if fields[name] == DEFAULTS[name]]
    if not {"scope_prior", "learn_scopes", "share_kv", "prior_form"} <= set(kept):
        return False
    if fields["query_init"] == "none":
        return {"fusion", "tile_heads", "patch_conv", "cell_residual"} <= set(kept)
    return is_separate(fields) and fields["query_init"] == "learned" and fields["fusion"] != "mean"


def variant(fields: dict[str, Any]) -> type[nn.Module]:
    """The class of the projector with these stored fields."""
    queries, separate = fields["query_init"] != "none", is_separate(fields)
    priors: list[type] = [(BranchPrior if separate else HeadsPrior) if queries else ScopePrior]
    layers: list[type] = [(BranchLayer if separate else QueryHeadsLayer) if queries else PriorLayer]
    tops: list[type] = [BranchesResampler if queries else MultiScopeResampler]
    if not fields["tile_heads"] or fields["scope_prior"] != "gaussian":
        priors.insert(0, AlikePrior)
    if not fields["learn_scopes"]:
        priors.insert(0, FixedPrior)
    if fields["scope_prior"] != "gaussian" or fields["prior_form"] == "bias" or not fields["share_kv"]:
        layers.insert(0, AttendPlainly if queries else ReadPlainly)
    if not fields["share_kv"]:
        layers.insert(0, SeparateKeys)
    if fields["fusion"] != "token":
        layers.insert(0, {"static": StaticGate, "mean": EvenGate}[fields["fusion"]])
    if not fields["cell_residual"]:
        layers.insert(0, WithoutCellMean)
    if not fields["patch_conv"]:
        tops.insert(0, WithoutNeighbours)
    if fields["query_init"] == "content":
        tops.insert(0, ContentQueries)
    bias = {"gaussian": gaussian_bias, "window": window_bias, "none": no_bias}[fields["scope_prior"]]
    prior = type("Prior", tuple(priors), {})
    layer = type("Layer", tuple(layers), {"prior_class": prior, "bias": staticmethod(bias)})
    return type("Variant", tuple(tops), {"layer_class": layer})


def has_gaussians(projector: nn.Module) -> bool:
    """Whether a projector with scopes has Gaussian priors."""
    layers: Any = projector.layers
    return getattr(layers[-1], "bias", gaussian_bias) is gaussian_bias


class FixedPrior(Change):
    """Sigmas and offsets stay as configured."""

    def __init__(self, config):
        super().__init__(config)
        fix(self, "log_scale", "offset")


class AlikePrior(Change):
    """All heads of a scope start with its full sigma and no offset; only sigmas are learned."""

    def __init__(self, config):
        super().__init__(config)
        fix(self, "offset")

    def initial(self) -> tuple[Tensor, Tensor]:
        sigma, offset = super().initial()
        scope_heads = self.config.scope_heads or [sigma.shape[1]] * len(sigma)
        whole = [
            spread(scope, 1)[0].expand(heads)
            for scope, heads in zip(self.config.scope_sigmas, scope_heads, strict=True)
        ]
        return torch.cat(whole).view_as(sigma), torch.zeros_like(offset)


def fix(module: nn.Module, *names: str) -> None:
    """Replaces parameters by buffers."""
    for name in names:
        value = getattr(module, name).data
        delattr(module, name)
        module.register_buffer(name, value)


class HeadsPrior(BranchPrior):
    """The prior of heads that scopes share, for tokens with queries."""

    initial = ScopePrior.initial


class ToldSpace(MovingSpace):
    """An oracle: space is told which patches hold the scene, 1 or 0, and need not learn how much there is to tell."""

    told_BHW: Tensor

    def how_much(self, u_BND: Tensor, patch_grid: Grid) -> Tensor:
        m_BHW = self.told_BHW
        return self.floor / u_BND.shape[1] + (1 - self.floor) * m_BHW / m_BHW.sum((1, 2), keepdim=True)


def distances(prior: ScopePrior, patch_grid: Grid, token_grid: Grid, like: Tensor) -> Tensor:
    """Squared distances (G, h, M, N) of patches from each token's anchor with the heads' offsets, in anchor pitches."""
    anchor_M2, patch_N2 = (
        torch.cartesian_prod(*((centres(cells, like) - 0.5) * pitches for cells, pitches in axes))
        for axes in (zip(token_grid, token_grid, strict=True), zip(patch_grid, token_grid, strict=True))
    )
    anchor_GhM2 = anchor_M2 + prior.offset[:, :, None].to(anchor_M2.dtype)
    return (anchor_GhM2[..., None, :] - patch_N2).square().sum(-1)


def gaussian_bias(prior: ScopePrior, patch_grid: Grid, token_grid: Grid, like: Tensor) -> Tensor:
    """The Gaussian prior (G, h, M, N), to be added to scores."""
    squared_GhMN = distances(prior, patch_grid, token_grid, like)
    return -0.5 * prior.precision(squared_GhMN.dtype)[:, :, None, None] * squared_GhMN


def window_bias(prior: ScopePrior, patch_grid: Grid, token_grid: Grid, like: Tensor) -> Tensor:
    """A disc of radius 2 sigma, which has a Gaussian's variance, and at least the nearest patch; -inf outside."""
    squared_GhMN = distances(prior, patch_grid, token_grid, like)
    radius_Gh11 = 2 * prior.sigma.to(squared_GhMN.dtype)[:, :, None, None]
    # A patch on the edge counts as inside, despite rounding.
    reach_GhM1 = torch.maximum(radius_Gh11.square(), squared_GhMN.amin(dim=-1, keepdim=True)) + 1e-4
    return torch.zeros_like(squared_GhMN).masked_fill(squared_GhMN > reach_GhM1, -math.inf)


def no_bias(prior: ScopePrior, patch_grid: Grid, token_grid: Grid, like: Tensor) -> Tensor:
    """No prior."""
    return like.new_zeros(1)


class PriorLayer(ScopeLayer):
    """The default's layer, with another prior."""

    def __init__(self, config):
        super().__init__(config)
        self.prior = self.prior_class(config)


class ReadPlainly(Change):
    """Heads that score patches once for all tokens, with the prior as a bias on every score instead of by axes."""

    def read(self, u_BND, places, output_scopes):
        bias_1hMN = self.bias(self.prior, places.patch_grid, places.token_grid, u_BND)
        attention_BhMN = (self.score(u_BND).mT[:, :, None] + bias_1hMN).softmax(dim=-1)
        value_BhNd = split_heads(self.v_proj(u_BND), self.heads)
        o_BMD = merge_heads(attention_BhMN.to(value_BhNd.dtype) @ value_BhNd)
        return o_BMD, self.mean_over_heads(attention_BhMN) if output_scopes else None


class QueryHeadsLayer(BranchLayer):
    """Tokens with queries, of heads that scopes share: gates as in the default's layer."""

    def __init__(self, config):
        GradientCheckpointingLayer.__init__(self)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.scope_heads, self.fusion = config.num_attention_heads, config.scope_heads, "token"
        self.mean_over_heads = MeanOverHeads(list(config.scope_heads))
        self.scope_embedding = nn.Parameter(torch.zeros(1, width))
        self.query_norm = nn.LayerNorm(width, eps=eps)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.prior = self.prior_class(config)
        self.gate_norm = nn.LayerNorm(width, eps=eps)
        self.gate = LinearFromZero(width, config.num_scopes, bias=False)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.intermediate_size), nn.GELU(), nn.Linear(config.intermediate_size, width)
        )

    def fuse(self, o_BGhMd: Tensor, q_BGMD: Tensor) -> tuple[Tensor, Tensor]:
        o_BMD, q_BMD = merge_heads(o_BGhMd)[:, 0], q_BGMD[:, 0]
        g_BMS = self.gate(self.gate_norm(o_BMD + q_BMD)).softmax(dim=-1)
        g_BMh = torch.cat([g.expand(-1, -1, n) for g, n in zip(g_BMS.split(1, -1), self.scope_heads, strict=True)], -1)
        o_BMhd = len(self.scope_heads) * g_BMh[..., None] * o_BMD.unflatten(-1, (self.heads, -1))
        return self.o_proj(o_BMhd.flatten(-2)) + q_BMD, g_BMS.mT


class AttendPlainly(Change):
    """Tokens with queries, with a bias added to every score. Keys and values are one set, or one for each scope."""

    key_sets = 1

    def attend(self, q_BGMD, u_BND, placed_BND, patch_grid, token_grid, output_scopes):
        query_BGhMd = split_heads(self.q_proj(self.query_norm(q_BGMD)), self.heads)
        key_BKhNd, value_BKhNd = (
            split_heads(x.unflatten(-1, (self.key_sets, -1)).transpose(1, 2), self.heads)
            for x in (self.k_proj(placed_BND), self.v_proj(u_BND))
        )
        query, key, value = (
            x.expand(len(u_BND), query_BGhMd.shape[1], *[-1] * 3) for x in (query_BGhMd, key_BKhNd, value_BKhNd)
        )
        bias_GhMN = self.bias(self.prior, patch_grid, token_grid, u_BND)
        o_BGhMd = F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if self.bias is no_bias else bias_GhMN[None].to(query.dtype)
        )
        if not output_scopes:
            return o_BGhMd, None
        scores = query @ key.mT * query.shape[-1] ** -0.5 + bias_GhMN
        return o_BGhMd, self.mean_over_heads(scores.softmax(dim=-1).flatten(1, 2))


class SeparateKeys(Change):
    """Every scope has keys and values of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.key_sets = config.num_scopes
        width = config.hidden_size
        self.k_proj, self.v_proj = (nn.Linear(width, width * self.key_sets) for _ in range(2))


class StaticGate(Change):
    """A learned weight for each scope, the same for all tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_norm, self.gate = nn.Identity(), Logits(config.num_scopes)


class EvenGate(StaticGate):
    """All scopes have the same weight."""

    def __init__(self, config):
        super().__init__(config)
        fix(self.gate, "logits")


class Logits(nn.Module):
    """The same logits for every token; they start at zero."""

    def __init__(self, scopes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(scopes))

    def forward(self, x_BMD: Tensor) -> Tensor:
        return self.logits.to(x_BMD.dtype).expand(*x_BMD.shape[:-1], -1)


class WithoutCellMean(Change):
    """Tokens do not receive the mean of their cell."""

    def forward(self, z_BMD, u_BND, *others):
        before = 0 if isinstance(self, ScopeLayer) else 1  # arguments before the cell means
        nothing = torch.zeros_like(others[before])
        return super().forward(z_BMD, u_BND, *others[:before], nothing, *others[before + 1 :])


class WithoutNeighbours(Change):
    """No convolution over neighbouring patches."""

    def __init__(self, config, vision_width: int, text_width: int):
        super().__init__(config, vision_width, text_width)
        self.patch_conv = Zero()


class Zero(nn.Module):
    """Zeros in the shape of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class ContentQueries(Change):
    """Queries start from the mean of the patches in their cell."""

    def first_tokens(self, anchors_M2: Tensor, token_grid: Grid, mean_BMD: Tensor) -> Tensor:
        return super().first_tokens(anchors_M2, token_grid, mean_BMD) + mean_BMD
