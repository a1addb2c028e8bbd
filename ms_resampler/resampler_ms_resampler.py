"""The multi-scope resampler: patch features (B, N, C) to visual tokens (B, M, T), in pure torch.

    u   = LN(x) W_in                                     patches, at the resampler's width
    u   = LN(u + DWConv_3x3(u))                          each patch with its neighbours
    o_h = softmax(w_h . gelu(W_u u) + B^s) W_v u         head h, which belongs to scope s
    B^s_ij = -|| (a_i - p_j) / c ||^2 / (2 sigma_s^2)    scope prior; c is the anchor pitch, B = 0 for global
                                                         (each head has a part of the scope: `tiles`)
    z   = W_o [S g^s o_h]_h + z + mean of u in the cell  adaptive fusion over the scopes; z starts at 0
    z   = z + FFN(LN(z));   y = W_out LN(z)

A head scores a patch in the same way for every token: only the prior says which token reads it. So o_h is a filter of
the image, and as a Gaussian is a product over the two axes, it is done along the rows of patches, then across them:

    o_h = softmax_rows(l + B^y) softmax_columns(s + B^x) W_v u;   l = logsumexp_columns(s + B^x), s = w_h . gelu(W_u u)

With `query_init` "learned" or "content" tokens ask by themselves, and u, without its last norm, is read at its place:

    q   = z + e                                          queries; z starts as base grid + pos(a)
    o_h = softmax(W_q LN(q) . W_k(u + pos(p)) / sqrt(d) + B^s) W_v u, and q instead of z in the sum

There, in the layout "branches", every scope has queries q^s = z + e_s for all heads, and z = sum_s g^s (W_o o^s + q^s).
The mean of the cell is there with `cell_residual`. With `pooled_mlp`, y = W_out LN(z) + MLP(mean of the features x in
the cell), and W_out starts at zero.

Dimensions, as name suffixes: B images, N patches, M visual tokens, S scopes, G query sets (S in the layout
"branches", 1 in "heads"), C vision width, D resampler width, T text width, h heads, d head width.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class ScopeMaps:
    """What a person wants to see: how much each token trusted each scope, and where each scope looked.

    weights_BSM sums to one over the scopes; attentions_BSMN sums to one over the patches (mean over heads).
    """

    weights_BSM: Tensor
    attentions_BSMN: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of geometry beside numbers of a dtype: never narrower than float32."""
    return torch.promote_types(dtype, torch.float32)


def centres(cells: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centres of equal cells that share out the unit interval."""
    return (torch.arange(cells, device=device, dtype=dtype) + 0.5) / cells


def cell_centres(
    grid: tuple[int, int], device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Centres (y, x) of the cells of a grid over the unit square, in raster order: (rows * columns, 2)."""
    return torch.cartesian_prod(*(centres(cells, device, dtype) for cells in grid))


def sincos_positions(points_P2: Tensor, width: int) -> Tensor:
    """Unit-scale 2-D sin-cos codes (P, width) of points in [0, 1]^2.

    Wavelengths run geometrically from two images to 1/32 of an image, so that codes do not depend on a grid.
    """
    octaves = torch.linspace(0, 6, width // 4, device=points_P2.device, dtype=points_P2.dtype)
    angles = points_P2[:, :, None] * (math.pi * 2**octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1) * math.sqrt(2)


def grid_positions(grid: tuple[int, int], width: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """`sincos_positions` of a grid's `cell_centres`, with the sines of each row and column taken once."""
    rows, columns = (centres(cells, device, dtype)[:, None] for cells in grid)
    row_HE, column_WE = (sincos_positions(axis, width) for axis in (rows, columns))
    return torch.cat([row_HE[:, None].expand(-1, grid[1], -1), column_WE.expand(grid[0], -1, -1)], dim=-1).flatten(0, 1)


class Geometry(NamedTuple):
    """The two grids and what they decide, whatever the image.

    Anchors and patches are (y, x) from the middle of the image in units of the anchor pitch, in float32 or wider. The
    rest is for tokens that ask, and empty for others: `sincos_positions` as codes, and the channels that the Gaussian
    prior appends to keys, with zeros up to a multiple of 8 with the head's own, which kernels like.
    """

    patch_grid: tuple[int, int]
    token_grid: tuple[int, int]
    anchors_M2: Tensor
    patches_N2: Tensor
    anchor_codes_MD: Tensor
    patch_codes_ND: Tensor
    channels_Ne: Tensor


def make_geometry(
    patch_grid: tuple[int, int],
    token_grid: tuple[int, int],
    width: int,
    key_width: int | None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Geometry:
    """The geometry of patches (..., width) of a dtype and heads with keys of a width, None where no token asks."""
    anchors_M2, patches_N2 = (
        torch.cartesian_prod(*((centres(cells, device, wide(dtype)) - 0.5) * pitches for cells, pitches in axes))
        for axes in (zip(token_grid, token_grid, strict=True), zip(patch_grid, token_grid, strict=True))
    )
    if key_width is None:
        nothing = anchors_M2[:0]
        return Geometry(patch_grid, token_grid, anchors_M2, patches_N2, nothing, nothing, nothing)
    anchor_codes_MD, patch_codes_ND = (
        grid_positions(grid, width, device, wide(dtype)) for grid in (token_grid, patch_grid)
    )
    key_N3 = torch.cat([patches_N2, -0.5 * patches_N2.square().sum(-1, keepdim=True)], dim=-1)
    channels_Ne = key_N3.to(dtype)
    if dtype.itemsize < 4:
        high_N3, low_N3 = high_and_low(key_N3, dtype)
        channels_Ne = torch.cat([high_N3, low_N3, high_N3], dim=-1)
    padding = -(key_width + channels_Ne.shape[-1]) % 8
    channels_Ne = F.pad(channels_Ne, (0, padding))
    return Geometry(
        patch_grid, token_grid, anchors_M2, patches_N2, anchor_codes_MD, patch_codes_ND.to(dtype), channels_Ne
    )


_kept_geometry = lru_cache(maxsize=16)(make_geometry)


def geometry_of(
    u_BND: Tensor, patch_grid: tuple[int, int], token_grid: tuple[int, int], key_width: int | None
) -> Geometry:
    """`make_geometry` for patches, kept from call to call: a GPU takes as long to start its kernels as all others.

    Nothing is kept where tensors only stand for others or a graph records where its memory is.
    """
    asked = (patch_grid, token_grid, u_BND.shape[-1], key_width, u_BND.device, u_BND.dtype)
    if torch.compiler.is_compiling() or type(u_BND) is not Tensor:
        return make_geometry(*asked)
    if u_BND.is_cuda and torch.cuda.is_current_stream_capturing():
        return make_geometry(*asked)
    with torch.inference_mode(False):  # or training could not use it later
        return _kept_geometry(*asked)


def check_patches(x_BNC: Tensor, patch_grid: tuple[int, int]) -> None:
    """Raises ValueError if the features are not as many as the grid has patches."""
    if x_BNC.shape[1] != patch_grid[0] * patch_grid[1]:
        raise ValueError(
            f"Got {x_BNC.shape[1]} patch features for a grid of {patch_grid[0]} x {patch_grid[1]} patches: "
            "the vision tower's prefix tokens or the image size do not fit the configuration."
        )


def as_map(x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, C) -> (B, C, H, W), in place: channels last, as convolutions and pooling like it.

    In this order of steps, because unflattening the transpose of one image hides from them that it is so.
    """
    return x_BNC.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)."""
    return x_BCHW.flatten(2).mT


def cell_means(x_BNC: Tensor, patch_grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """The mean of the patches in each token's cell (B, M, C); cells share patches where grids do not divide."""
    return as_tokens(F.adaptive_avg_pool2d(as_map(x_BNC, patch_grid), token_grid))


def mlp(inputs: int, outputs: int, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear, activation, Linear: the hidden width is that of the output."""
    return nn.Sequential(nn.Linear(inputs, outputs), activation(), nn.Linear(outputs, outputs))


class LinearFromZero(nn.Linear):
    """A linear map whose matrix starts at zero."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., P, h*d) -> (..., h, P, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., h, P, d) -> (..., P, h*d)."""
    return x.transpose(-3, -2).flatten(-2)


def widen(x: Tensor, width: int) -> Tensor:
    """x with zeros up to a width of its last dimension."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def along(points_P2: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The y of a grid's rows and the x of its columns, from all its points (..., P, 2) in raster order."""
    return points_P2[..., :: grid[1], 0], points_P2[..., : grid[1], 1]


def high_and_low(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as a sum of two numbers of a narrower dtype: twice its digits."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


class ScopePrior(nn.Module):
    """Where each query set and head may look: B^s of the module's equations.

    "gaussian" starts at the configured sigmas, with the heads of a scope spread over it if `tile_heads`; sigmas (in
    log space) and offsets are learned if `learn_scopes`. "window" is a disc of radius 2 sigma, at least as wide as the
    nearest patch, outside which the score is -inf (a patch on its edge is inside, whatever the last digit of its
    distance); "none" is no prior.
    """

    sigma_Gh: Tensor
    log_scale_Gh: Tensor
    offset_Gh2: Tensor

    def __init__(self, config):
        super().__init__()
        self.config, self.kind, self.form = config, config.scope_prior, config.prior_form
        self.learned = config.learn_scopes and self.kind == "gaussian"
        self.tiled = config.tile_heads and self.kind == "gaussian"
        sigma_Gh, offset_Gh2 = self.configured()
        self.register_buffer("sigma_Gh", sigma_Gh)
        if self.learned:
            self.log_scale_Gh = nn.Parameter(torch.zeros_like(sigma_Gh))
        if self.tiled and self.learned:
            self.offset_Gh2 = nn.Parameter(offset_Gh2)
        elif self.tiled:
            self.register_buffer("offset_Gh2", offset_Gh2)

    def configured(self) -> tuple[Tensor, Tensor]:
        """The configuration's sigma (G, h), infinite for the global scope, and offset (G, h, 2) of every head.

        Heads that share out a scope see half as far as the scope.
        """
        sigmas, offsets, scope_Gh = [], [], scopes_of_heads(self.config)
        for scope_h in scope_Gh:
            for scope in sorted(set(scope_h)):
                sigma, heads = self.config.scope_sigmas[scope], scope_h.count(scope)
                shared = self.tiled and sigma is not None and heads > 1
                offsets.append(sigma * tiles(heads) if shared else torch.zeros(heads, 2))
                sigmas.append(torch.full((heads,), float(sigma / 2 if shared else sigma or math.inf)))
        return torch.cat(sigmas).unflatten(0, (len(scope_Gh), -1)), torch.cat(offsets).unflatten(0, (len(scope_Gh), -1))

    # Called as a module, not by these names: what moves offloaded weights around hooks into the call.
    def forward(self, geometry: Geometry, form: str) -> Tensor | tuple[Tensor, Tensor]:
        """The prior as an additive "bias", the same by its "axes", or the "channels" of queries to those of keys."""
        if form == "axes":
            return self.axes_Gh(geometry)
        if form == "bias":
            return self.bias_GhMN(geometry.anchors_M2, geometry.patches_N2)
        return self.channels_GhMe(geometry.anchors_M2, geometry.channels_Ne)

    def precision_Gh(self) -> Tensor:
        """1 / sigma^2 in float32 or wider, zero for the global scope."""
        dtype = wide(self.sigma_Gh.dtype)
        precision_Gh = self.sigma_Gh.to(dtype) ** -2
        return precision_Gh * torch.exp(-2 * self.log_scale_Gh.to(dtype)) if self.learned else precision_Gh

    def bias_GhMN(self, anchors_M2: Tensor, patches_N2: Tensor) -> Tensor:
        """The prior as an additive bias; anchors and patches (y, x) in units of the anchor pitch."""
        squared_GhMN = (self.of_heads(anchors_M2)[..., None, :] - patches_N2).square().sum(-1)
        if self.kind == "gaussian":
            return -0.5 * self.precision_Gh()[:, :, None, None] * squared_GhMN
        nearest_GhM1 = squared_GhMN.amin(dim=-1, keepdim=True)
        radius_Gh11 = 2 * self.sigma_Gh.to(wide(self.sigma_Gh.dtype))[:, :, None, None]
        reach_GhM1 = torch.maximum(radius_Gh11.square(), nearest_GhM1) + 1e-4
        return torch.zeros_like(squared_GhMN).masked_fill(squared_GhMN > reach_GhM1, -math.inf)

    def of_heads(self, anchors_M2: Tensor) -> Tensor:
        """The anchors (G, h, M, 2) of every head: those of the tokens, moved by the head's offset."""
        if not self.tiled:
            return anchors_M2.expand(*self.sigma_Gh.shape, -1, -1)
        return anchors_M2 + self.offset_Gh2[:, :, None].to(anchors_M2.dtype)

    def axes_Gh(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """The parts of the Gaussian prior along both axes: of rows of tokens and patches, and of their columns."""
        y_GhR, x_GhC = along(self.of_heads(geometry.anchors_M2), geometry.token_grid)
        y_H, x_W = along(geometry.patches_N2, geometry.patch_grid)
        half_Gh11 = -0.5 * self.precision_Gh()[:, :, None, None]
        return half_Gh11 * (y_GhR[..., None] - y_H).square(), half_Gh11 * (x_GhC[..., None] - x_W).square()

    def channels_GhMe(self, anchors_M2: Tensor, channels_Ne: Tensor) -> Tensor:
        """The Gaussian prior as a dot product: what to append to queries, where keys have the geometry's channels.

        -|a - p|^2 / 2 sigma^2 = (a . p - |p|^2 / 2) / sigma^2 up to a term of the row, which softmax ignores.
        Queries carry the factor sqrt(d) by which attention divides: after the split it would round them again.
        Half precision takes every factor in a high and a low part, or the prior would lose its digits.
        """
        precision_Gh11, dtype = self.precision_Gh()[:, :, None, None], channels_Ne.dtype
        query_GhM3 = precision_Gh11 * F.pad(self.of_heads(anchors_M2), (0, 1), value=1.0)
        query_GhM3 = query_GhM3 * math.sqrt(self.config.hidden_size // self.config.num_attention_heads)
        query_GhMe = query_GhM3.to(dtype)
        if dtype.itemsize < 4:
            high_GhM3, low_GhM3 = high_and_low(query_GhM3, dtype)
            query_GhMe = torch.cat([high_GhM3, high_GhM3, low_GhM3], dim=-1)
        return widen(query_GhMe, channels_Ne.shape[-1])


def tiles(heads: int) -> Tensor:
    """Where the heads of a scope start to look (heads, 2), in units of its sigma: spread evenly over the unit disc.

    The points of a sunflower, moved to have their mean at the centre; a head that is alone looks at the centre.
    """
    number_h = torch.arange(heads) + 0.5
    radius_h, angle_h = (number_h / heads).sqrt(), number_h * math.pi * (3 - math.sqrt(5))
    points_h2 = torch.stack([radius_h * angle_h.sin(), radius_h * angle_h.cos()], dim=-1)
    return points_h2 - points_h2.mean(dim=0)


def scopes_of_heads(config) -> list[list[int]]:
    """The scope (its index) of every head of every query set: G lists of h.

    Two scopes and three heads: [[0, 0, 0], [1, 1, 1]] in the layout "branches", [[0, 0, 1]] in "heads".
    """
    if config.scope_layout == "branches":
        return [[scope] * config.num_attention_heads for scope in range(config.num_scopes)]
    return [[scope for scope, heads in enumerate(config.scope_heads) for _ in range(heads)]]


class ScopeLayer(GradientCheckpointingLayer):
    """One round of resampling and fusion: tokens z (B, M, D) read patches u (B, N, D) in every scope.

    Tokens that do not depend on the image yet may come once, as (1, M, D). cell_BMD, or zero, is
    added to the tokens that come out.
    """

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads, self.scopes = config.num_attention_heads, config.num_scopes
        self.layout, self.fusion = config.scope_layout, config.fusion
        self.scope_Gh = scopes_of_heads(config)
        self.query_sets = len(self.scope_Gh)
        self.key_sets = 1 if config.share_kv else self.scopes

        self.asks = config.query_init != "none"
        if self.asks:
            self.scope_embedding_GD = nn.Parameter(torch.zeros(self.query_sets, width))
            self.query_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.q_proj = nn.Linear(width, width)
            self.k_proj = nn.Linear(width, width * self.key_sets)
        else:
            self.score = nn.Sequential(
                nn.Linear(width, width // 4),
                nn.GELU(),
                nn.Linear(width // 4, self.heads, bias=False),  # which softmax would ignore
            )
        self.separable = not self.asks and config.scope_prior == "gaussian" and config.prior_form == "channels"
        self.v_proj = nn.Linear(width, width * self.key_sets)
        self.o_proj = nn.Linear(width, width)
        self.prior = ScopePrior(config)
        self._init_gate(config)
        self.ffn_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.intermediate_size), nn.GELU(), nn.Linear(config.intermediate_size, width)
        )

    def _init_gate(self, config) -> None:
        """What computes g: a parameter a scope, a linear map of each token, or nothing for the mean."""
        if self.fusion == "static":
            self.gate_S = nn.Parameter(torch.zeros(self.scopes))
        if self.fusion in ("token", "head"):
            self.gate_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            logits = self.scopes if self.layout == "heads" else self.heads if self.fusion == "head" else 1
            self.gate = LinearFromZero(config.hidden_size, logits, bias=False)  # the norm has one

    def forward(
        self,
        z_BMD: Tensor,
        u_BND: Tensor,
        cell_BMD: Tensor | float,
        geometry: Geometry,
        output_scopes: bool,
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Steps 3 to 6 of the equations."""
        q_BGMD = z_BMD[:, None] + self.scope_embedding_GD[:, None] if self.asks else z_BMD[:, None]
        value_BKhNd = self._per_key_set(self.v_proj(u_BND))

        asked = None if self.separable else self._queries_and_keys(q_BGMD, u_BND, geometry)
        if asked is None:
            o_BGhMd = self._filter(self._scores(u_BND), value_BKhNd[:, 0], geometry)[:, None]
        else:
            o_BGhMd = self._attend(*asked, value_BKhNd, geometry)
        z_BMD, weights_BSM = self._fuse(o_BGhMd, q_BGMD)
        z_BMD = z_BMD + cell_BMD
        z_BMD = z_BMD + self.ffn(self.ffn_norm(z_BMD))
        if not output_scopes:
            return z_BMD, None
        query, key = asked or self._queries_and_keys(q_BGMD, u_BND, geometry)
        return z_BMD, ScopeMaps(weights_BSM, self._attention_maps(query, key, geometry))

    def _scores(self, u_BND: Tensor) -> Tensor:
        """s (B, h, N), in this order in memory, so that what is added to it is, too."""
        return self.score(u_BND).mT.contiguous()

    def _queries_and_keys(self, q_BGMD: Tensor, u_BND: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Queries (B, G, h, M, d) and keys (B, K, h, N, d) of the heads.

        Without queries, a head's key is its score of a patch, and every token asks for that: d is 1.
        """
        if not self.asks:
            key_BKhNd = self._scores(u_BND)[:, None, :, :, None]
            return key_BKhNd.new_ones(1).expand(len(u_BND), 1, self.heads, q_BGMD.shape[2], 1), key_BKhNd
        query_BGhMd = split_heads(self.q_proj(self.query_norm(q_BGMD)), self.heads)
        key_BKhNd = self._per_key_set(self.k_proj(u_BND + geometry.patch_codes_ND))
        return query_BGhMd.expand(len(u_BND), *[-1] * 4), key_BKhNd

    def _per_key_set(self, x: Tensor) -> Tensor:
        """(B, N, K*h*d) -> (B, K, h, N, d), K key sets: one, or one a scope."""
        return split_heads(x.unflatten(-1, (self.key_sets, -1)).transpose(1, 2), self.heads)

    def _filter(self, score_BhN: Tensor, value_BhNd: Tensor, geometry: Geometry) -> Tensor:
        """o (B, h, M, d) by rows and columns, with no score of a token and a patch: H x W patches to R x C tokens."""
        rows_hRH, columns_hCW = (part[0] for part in self.prior(geometry, "axes"))
        score_BhHCW = score_BhN.unflatten(-1, geometry.patch_grid)[..., None, :] + columns_hCW[:, None]
        weight_BhHCW, (peak_BhHC1, at_BhHC1) = score_BhHCW.softmax(dim=-1), score_BhHCW.max(dim=-1, keepdim=True)
        # The logarithm of each row's sum, from what softmax has computed: logsumexp would start eleven operations.
        log_BhHC = (peak_BhHC1 - weight_BhHCW.gather(-1, at_BhHC1).log()).squeeze(-1)
        o_BhHCd = weight_BhHCW.to(value_BhNd.dtype) @ value_BhNd.unflatten(-2, geometry.patch_grid)
        weight_BhCRH = (log_BhHC.mT[..., None, :] + rows_hRH[:, None]).softmax(dim=-1).to(value_BhNd.dtype)
        o_BhCRd = weight_BhCRH @ o_BhHCd.transpose(2, 3)
        return o_BhCRd.permute(0, 3, 2, 1, 4).flatten(1, 2).transpose(1, 2)  # laid out as heads are merged

    def _attend(self, query, key, value, geometry: Geometry) -> Tensor:
        """o (B, G, h, M, d): one attention call for all scopes that share keys and values."""
        bias, scale, width = None, query.shape[-1] ** -0.5, value.shape[-1]
        if self.prior.kind == "gaussian" and self.prior.form == "channels":
            query, key = self._with_prior_channels(query, key, geometry)
        elif self.prior.kind != "none":
            bias = self.prior(geometry, "bias")[None].to(query.dtype)
        widest = max(query.shape[-1], width)  # the fast kernels want one width
        query, key, value = (widen(x, widest) for x in (query, key, value))
        if self.key_sets > 1:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)[..., :width]
        query, bias = fold_scopes(query), None if bias is None else fold_scopes(bias)
        out = F.scaled_dot_product_attention(query, key[:, 0], value[:, 0], attn_mask=bias, scale=scale)
        return out[..., :width].unflatten(2, (self.query_sets, -1)).transpose(1, 2)

    def _with_prior_channels(self, query, key, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Appends the prior to queries and keys."""
        extra_q, extra_k = self.prior(geometry, "channels"), geometry.channels_Ne
        query = torch.cat([query, extra_q.expand(*query.shape[:-1], -1)], dim=-1)
        return query, torch.cat([key, extra_k.expand(*key.shape[:-1], -1)], dim=-1)

    def _fuse(self, o_BGhMd: Tensor, q_BGMD: Tensor) -> tuple[Tensor, Tensor]:
        """Step 5: the tokens z (B, M, D) and the weights g (B, S, M) that made them."""
        if self.layout == "heads":
            return self._fuse_heads(merge_heads(o_BGhMd)[:, 0], q_BGMD[:, 0])
        if self.fusion == "head":
            logits_BSMh = self.gate(self.gate_norm(merge_heads(o_BGhMd) + q_BGMD))
            g_BShM1 = logits_BSMh.softmax(dim=1).transpose(2, 3).unsqueeze(-1)
            g_BSM = g_BShM1.mean(dim=(2, -1))
            o_BMD = merge_heads((g_BShM1 * o_BGhMd).sum(dim=1))
            return self.o_proj(o_BMD) + (g_BSM[..., None] * q_BGMD).sum(dim=1), g_BSM
        z_BSMD = self.o_proj(merge_heads(o_BGhMd)) + q_BGMD
        if self.fusion == "token":
            g_BSM = self.gate(self.gate_norm(z_BSMD)).squeeze(-1).softmax(dim=1)
        else:
            g_BSM = self._fixed_weights_S(z_BSMD)[:, None].expand(z_BSMD.shape[:3])
        return (g_BSM[..., None] * z_BSMD).sum(dim=1), g_BSM

    def _fuse_heads(self, o_BMD: Tensor, q_BMD: Tensor) -> tuple[Tensor, Tensor]:
        """Layout "heads": every head group is scaled by S g_s, so that even weights change nothing."""
        if self.fusion == "token":
            g_BMS = self.gate(self.gate_norm(o_BMD + q_BMD)).softmax(dim=-1)
        else:
            g_BMS = self._fixed_weights_S(o_BMD).expand(*o_BMD.shape[:2], -1)
        # Spread over heads without an index, which would have to be sent to a GPU at every call.
        heads_S = [self.scope_Gh[0].count(scope) for scope in range(self.scopes)]
        g_BMh = torch.cat([g.expand(-1, -1, heads) for g, heads in zip(g_BMS.split(1, -1), heads_S, strict=True)], -1)
        o_BMD = (self.scopes * g_BMh[..., None] * o_BMD.unflatten(-1, (self.heads, -1))).flatten(-2)
        return self.o_proj(o_BMD) + q_BMD, g_BMS.transpose(1, 2)

    def _fixed_weights_S(self, outputs: Tensor) -> Tensor:
        """g of the fusions that do not look at the tokens: "static" and "mean"."""
        if self.fusion == "static":
            return self.gate_S.softmax(dim=0).to(outputs.dtype)
        return outputs.new_full((self.scopes,), 1 / self.scopes)

    def _attention_maps(self, query, key, geometry: Geometry) -> Tensor:
        """A (B, S, M, N): the attention of every scope, mean over its heads, computed plainly."""
        dtype = wide(query.dtype)
        scores_BGhMN = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
        if self.prior.kind != "none":
            scores_BGhMN = scores_BGhMN + self.prior(geometry, "bias")
        maps_BGhMN = scores_BGhMN.softmax(dim=-1)
        if self.layout == "branches":
            return maps_BGhMN.mean(dim=2)
        heads_S = [[head for head, scope in enumerate(self.scope_Gh[0]) if scope == s] for s in range(self.scopes)]
        return torch.stack([maps_BGhMN[:, 0, heads].mean(dim=1) for heads in heads_S], dim=1)


def fold_scopes(x_BGhMe: Tensor) -> Tensor:
    """(B, G, h, M, e) -> (B, h, G*M, e): the query sets become rows of one attention call."""
    return x_BGhMe.transpose(1, 2).flatten(2, 3)


class MultiScopeResampler(nn.Module):
    """Patch features of any grid to visual tokens of any grid; see the equations at the top of this file."""

    def __init__(self, config, vision_width: int, text_width: int):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.input_norm = nn.LayerNorm(vision_width, eps=config.layer_norm_eps)
        self.input_proj = nn.Linear(vision_width, width)
        if config.patch_conv:
            self.patch_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.asks = config.query_init != "none"
        if not self.asks:
            self.patch_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        else:
            self.query_1DHW = nn.Parameter(torch.zeros(1, width, *config.query_grid))
        self.layers = nn.ModuleList(ScopeLayer(config) for _ in range(config.num_hidden_layers))
        self.output_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_proj = (LinearFromZero if config.pooled_mlp else nn.Linear)(width, text_width)
        if config.pooled_mlp:
            self.mlp = mlp(vision_width, text_width)

    def forward(
        self,
        x_BNC: Tensor,
        patch_grid: tuple[int, int],
        token_grid: tuple[int, int],
        output_scopes: bool = False,
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Visual tokens (B, M, T) in raster order of `token_grid`, and the last layer's maps if asked for.

        Raises ValueError if the features are not a patch grid of the shape given.
        """
        check_patches(x_BNC, patch_grid)
        u_BND = self._patches(x_BNC, patch_grid)
        key_width = self.config.hidden_size // self.config.num_attention_heads if self.asks else None
        geometry = geometry_of(u_BND, patch_grid, token_grid, key_width)
        mean_BMD = cell_means(u_BND, patch_grid, token_grid)
        cell_BMD = mean_BMD if self.config.cell_residual else 0.0
        z_BMD, maps = self._first_queries(u_BND, geometry), None
        if self.config.query_init == "content":
            z_BMD = z_BMD + mean_BMD
        for layer in self.layers:
            z_BMD, maps = layer(z_BMD, u_BND, cell_BMD, geometry, output_scopes)
        y_BMT = self.output_proj(self.output_norm(z_BMD))
        if self.config.pooled_mlp:
            y_BMT = y_BMT + self.mlp(cell_means(x_BNC, patch_grid, token_grid))
        return y_BMT, maps

    def _patches(self, x_BNC: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """u (B, N, D): the patches at the resampler's width, each with its neighbours."""
        u_BND = self.input_proj(self.input_norm(x_BNC))
        if self.config.patch_conv:
            u_BND = u_BND + as_tokens(self.patch_conv(as_map(u_BND, patch_grid)))
        return u_BND if self.asks else self.patch_norm(u_BND)

    def _first_queries(self, u_BND: Tensor, geometry: Geometry) -> Tensor:
        """z (1, M, D) before the first layer, the same for every image: the base grid at the anchors + pos(a), or 0."""
        if not self.asks:
            return u_BND.new_zeros(1, len(geometry.anchors_M2), u_BND.shape[-1])
        codes_MD = geometry.anchor_codes_MD
        query_1DHW = self.query_1DHW.to(codes_MD.dtype)
        base_1DHW = F.interpolate(query_1DHW, size=geometry.token_grid, mode="bilinear", align_corners=False)
        return (base_1DHW.flatten(2).mT + codes_MD).to(u_BND.dtype)


@torch.no_grad()
def init_resampler_weights(module: nn.Module) -> None:
    """The initialisation, as a table, of a module whose children have had theirs (`Module.apply` goes that way).

    Every sum of random terms keeps the variance of its inputs.

    Linear, Conv2d  normal, std 1 / sqrt(inputs); bias 0           static weights   0: even at the start
    LayerNorm       weight 1, bias 0                               base queries     normal, std 0.02
    scope embedding normal, std 1: scopes differ from the start    log scale        0: the configured scopes
                    (std 0.02 where there is one query set)
    LinearFromZero  0: even weights of the scopes at the start; no part in the output beside a pooled MLP

    By its own class, not by that of the module around it: transformers passes over a module without weights of its own.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if isinstance(module, LinearFromZero):
            init.zeros_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, MultiScopeResampler):
        if module.asks:
            init.normal_(module.query_1DHW, std=0.02)
    elif isinstance(module, ScopeLayer):
        if module.asks:
            init.normal_(module.scope_embedding_GD, std=1.0 if module.query_sets > 1 else 0.02)
        if module.fusion == "static":
            init.zeros_(module.gate_S)
    elif isinstance(module, ScopePrior):
        sigma_Gh, offset_Gh2 = module.configured()
        init.copy_(module.sigma_Gh, sigma_Gh)
        if module.learned:
            init.zeros_(module.log_scale_Gh)
        if module.tiled:
            init.copy_(module.offset_Gh2, offset_Gh2)


__all__ = ["MultiScopeResampler", "ScopeMaps", "init_resampler_weights"]
