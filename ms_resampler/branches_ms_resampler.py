"""The literal reading of multi-scope resampling: every scope is a resampler of its own, with learned queries.

    u   = LN(x) W_in;  u = u + DWConv_3x3(u)                        patches at the resampler's width
    q^s = z + e_s                                                   queries; z starts as base grid + pos(a)
    o^s = softmax(W_q LN(q^s) . W_k (u + pos(p)) / sqrt(d) + B^s) (u W_v)
    z   = sum_s g^s (o^s W_o + q^s) + cell mean of u                g = softmax over the scopes of W_g LN(o^s W_o + q^s)
    z   = z + FFN(LN(z));   y = LN(z) W_out

Here every scope has all heads, and its prior B^s is in the cross-attention. With a single scope this is the usual
resampler, `Resampler`. Shapes are named as in resampler_ms_resampler.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .places_ms_resampler import (
    LinearFromZero,
    ScopeMaps,
    as_map,
    as_tokens,
    cell_centres,
    cell_means,
    centres,
    check_patches,
    mlp,
    sincos_positions,
    spread,
    wide,
)
from .resampler_ms_resampler import MeanOverHeads, ScopePrior

Grid = tuple[int, int]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., P, h*d) -> (..., h, P, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """(..., h, P, d) -> (..., P, h*d)."""
    return x.transpose(-3, -2).flatten(-2)


def high_and_low(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Splits x into two numbers of a narrower dtype whose sum has twice the precision."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


class BranchPrior(ScopePrior):
    """The Gaussian prior of every scope and head, as extra channels of queries and keys instead of a bias (M, N).

        -|a - p|^2 / 2 sigma^2 = (a . p - |p|^2 / 2) / sigma^2   up to terms constant in p, which cancel

    In half precision every factor is split into a high and a low part to keep the prior's precision.
    """

    def __init__(self, config):
        super().__init__(config)
        if not config.branch("tile_heads"):
            self.register_parameter("offset", None)

    def initial(self) -> tuple[Tensor, Tensor]:
        """The configured sigma (S, h) and offset (S, h, 2): a scope's heads start spread over it, or all the same."""
        heads, tiled = self.config.num_attention_heads, self.config.branch("tile_heads")
        scopes = [spread(sigma, heads if tiled else 1) for sigma in self.config.scope_sigmas]
        sigmas, offsets = zip(*scopes, strict=True)
        return torch.stack(sigmas).expand(-1, heads).clone(), torch.stack(offsets).expand(-1, heads, -1).clone()

    def forward(  # type: ignore[override]  # places are even here, and may be in half precision
        self, patch_grid: Grid, token_grid: Grid, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The channels to append to queries (S, h, M, e) and to keys (N, e)."""
        anchors_M2, patches_N2 = (
            torch.cartesian_prod(*((centres(cells, like) - 0.5) * tokens for cells, tokens in axes))
            for axes in (zip(token_grid, token_grid, strict=True), zip(patch_grid, token_grid, strict=True))
        )
        anchors_ShM2 = anchors_M2.expand(*self.sigma.shape, -1, -1)
        if self.offset is not None:
            anchors_ShM2 = anchors_M2 + self.offset[:, :, None].to(anchors_M2.dtype)
        key = torch.cat([patches_N2, -0.5 * patches_N2.square().sum(-1, keepdim=True)], dim=-1)
        query = self.precision(anchors_M2.dtype)[:, :, None, None] * F.pad(anchors_ShM2, (0, 1), value=1.0)
        # Cancels attention's scaling here, since after the split it would round the parts again.
        head_width = self.config.hidden_size // self.config.num_attention_heads
        query = query * math.sqrt(head_width)
        if like.dtype.itemsize < 4:
            (key, key_low), (query, query_low) = (high_and_low(x, like.dtype) for x in (key, query))
            key, query = torch.cat([key, key_low, key], dim=-1), torch.cat([query, query, query_low], dim=-1)
        padding = 0, -(head_width + key.shape[-1]) % 8  # to a multiple of 8, for fast kernels
        return F.pad(query, padding).to(like.dtype), F.pad(key, padding).to(like.dtype)


class BranchLayer(GradientCheckpointingLayer):
    """One layer: tokens z (B, M, D) read patches u (B, N, D) with the queries of every scope, and fuse the results.

    The fusion weights are by "token" as in the equations, by "head" (before W_o), or "static" (one learned weight for
    each scope).
    """

    prior_class: type[ScopePrior] = BranchPrior

    def __init__(self, config):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.fusion = config.num_attention_heads, config.branch("fusion")
        self.prior = self.prior_class(config)
        self.mean_over_heads = MeanOverHeads([config.num_attention_heads] * config.num_scopes)
        self.scope_embedding = nn.Parameter(torch.zeros(len(self.prior.sigma), width))
        self.query_norm = nn.LayerNorm(width, eps=eps)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        if self.fusion == "static":
            self.scope_logits = nn.Parameter(torch.zeros(config.num_scopes))
        else:
            self.gate_norm = nn.LayerNorm(width, eps=eps)
            self.gate = LinearFromZero(width, self.heads if self.fusion == "head" else 1, bias=False)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.intermediate_size), nn.GELU(), nn.Linear(config.intermediate_size, width)
        )

    def forward(
        self,
        z_BMD: Tensor,
        u_BND: Tensor,
        placed_BND: Tensor,
        cell_BMD: Tensor | float,
        patch_grid: Grid,
        token_grid: Grid,
        output_scopes: bool,
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Returns the next tokens and maps; `placed_BND` is u + pos(p), and z is (1, M, D) in the first layer."""
        q_BSMD = z_BMD[:, None] + self.scope_embedding[:, None]
        o_BShMd, attention_BSMN = self.attend(q_BSMD, u_BND, placed_BND, patch_grid, token_grid, output_scopes)
        z_BMD, g_BSM = self.fuse(o_BShMd, q_BSMD)
        z_BMD = z_BMD + cell_BMD
        z_BMD = z_BMD + self.ffn(self.ffn_norm(z_BMD))
        if attention_BSMN is None:
            return z_BMD, None
        anchors_M2 = cell_centres(token_grid, u_BND.device, wide(u_BND.dtype))
        return z_BMD, ScopeMaps(g_BSM, attention_BSMN, anchors_M2.expand(len(u_BND), -1, -1))

    def attend(
        self,
        q_BSMD: Tensor,
        u_BND: Tensor,
        placed_BND: Tensor,
        patch_grid: Grid,
        token_grid: Grid,
        output_scopes: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' output (B, S, h, M, d), in one call for all scopes; attention (B, S, M, N) if requested."""
        query_BShMd = split_heads(self.q_proj(self.query_norm(q_BSMD)), self.heads).expand(u_BND.shape[0], *[-1] * 4)
        key_BhNd, value_BhNd = (split_heads(x, self.heads) for x in (self.k_proj(placed_BND), self.v_proj(u_BND)))
        width = value_BhNd.shape[-1]
        query_ShMe, key_Ne = self.prior(patch_grid, token_grid, u_BND)
        query = torch.cat([query_BShMd, query_ShMe.expand(*query_BShMd.shape[:-1], -1)], dim=-1)
        key = torch.cat([key_BhNd, key_Ne.expand(*key_BhNd.shape[:-1], -1)], dim=-1)

        rows = query.transpose(1, 2).flatten(2, 3)  # all scopes' queries as rows of one attention
        value = F.pad(value_BhNd, (0, query.shape[-1] - width))  # fast kernels need equal widths
        out = F.scaled_dot_product_attention(rows, key, value, scale=width**-0.5)[..., :width]
        o_BShMd = out.unflatten(2, (query.shape[1], -1)).transpose(1, 2)
        if not output_scopes:
            return o_BShMd, None
        scores = query.to(wide(query.dtype)) @ key[:, None].to(wide(query.dtype)).mT * width**-0.5
        return o_BShMd, self.mean_over_heads(scores.softmax(dim=-1).flatten(1, 2))

    def fuse(self, o_BShMd: Tensor, q_BSMD: Tensor) -> tuple[Tensor, Tensor]:
        """The fused tokens z (B, M, D) and the weights g (B, S, M)."""
        if self.fusion == "head":
            logits_BSMh = self.gate(self.gate_norm(merge_heads(o_BShMd) + q_BSMD))
            g_BShM1 = logits_BSMh.softmax(dim=1).transpose(2, 3).unsqueeze(-1)
            g_BSM = g_BShM1.mean(dim=(2, -1))
            o_BMD = merge_heads((g_BShM1 * o_BShMd).sum(dim=1))
            return self.o_proj(o_BMD) + (g_BSM[..., None] * q_BSMD).sum(dim=1), g_BSM
        z_BSMD = self.o_proj(merge_heads(o_BShMd)) + q_BSMD
        if self.fusion == "static":
            g_BSM = self.scope_logits.softmax(dim=0).to(z_BSMD.dtype)[:, None].expand(z_BSMD.shape[:3])
        else:
            g_BSM = self.gate(self.gate_norm(z_BSMD)).squeeze(-1).softmax(dim=1)
        return (g_BSM[..., None] * z_BSMD).sum(dim=1), g_BSM


class BranchesResampler(nn.Module):
    """Patch features of any grid to visual tokens of any grid; see the equations at the top of this file.

    With `pooled_mlp`, LLaVA's MLP of each cell's mean feature is added to y, and W_out starts at zero. Checkpoints of
    earlier versions may lack the convolution, the cell mean or the spread of heads over a scope, or fuse in another
    way, as `branch_form` in their configuration says.
    """

    layer_class = BranchLayer

    def __init__(self, config, vision_width: int, text_width: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.input_norm = nn.LayerNorm(vision_width, eps=eps)
        self.input_proj = nn.Linear(vision_width, width)
        if config.branch("patch_conv"):
            self.patch_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.query = nn.Parameter(torch.zeros(1, width, *config.query_grid))
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.num_hidden_layers))
        self.output_norm = nn.LayerNorm(width, eps=eps)
        self.output_proj = (LinearFromZero if config.pooled_mlp else nn.Linear)(width, text_width)
        if config.pooled_mlp:
            self.mlp = mlp(vision_width, text_width)

    def forward(
        self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid, output_scopes: bool = False
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Visual tokens (B, M, T) in raster order of `token_grid`, and the last layer's maps if requested.

        Raises ValueError if the number of features does not match the patch grid.
        """
        check_patches(x_BNC, patch_grid)
        u_BND = self.input_proj(self.input_norm(x_BNC))
        if self.config.branch("patch_conv"):
            u_BND = u_BND + as_tokens(self.patch_conv(as_map(u_BND, patch_grid)))
        patches_N2, anchors_M2 = (cell_centres(g, u_BND.device, wide(u_BND.dtype)) for g in (patch_grid, token_grid))
        placed_BND = u_BND + sincos_positions(patches_N2, u_BND.shape[-1]).to(u_BND.dtype)
        mean_BMD = cell_means(u_BND, patch_grid, token_grid)
        z_BMD, maps = self.first_tokens(anchors_M2, token_grid, mean_BMD), None
        cell_BMD = mean_BMD if self.config.branch("cell_residual") else 0.0
        for layer in self.layers:
            z_BMD, maps = layer(z_BMD, u_BND, placed_BND, cell_BMD, patch_grid, token_grid, output_scopes)
        y_BMT = self.output_proj(self.output_norm(z_BMD))
        if self.config.pooled_mlp:
            y_BMT = y_BMT + self.mlp(cell_means(x_BNC, patch_grid, token_grid))
        return y_BMT, maps

    def first_tokens(self, anchors_M2: Tensor, token_grid: Grid, mean_BMD: Tensor) -> Tensor:
        """z before the first layer (1, M, D), the same for every image: the base grid at the anchors + pos(a)."""
        codes_MD = sincos_positions(anchors_M2, mean_BMD.shape[-1])
        query = F.interpolate(self.query.to(codes_MD.dtype), size=token_grid, mode="bilinear", align_corners=False)
        return (query.flatten(2).mT + codes_MD).to(mean_BMD.dtype)


class Resampler(BranchesResampler):
    """The usual resampler, as a baseline: a single scope, global by default."""


@torch.no_grad()
def init_branches_weights(module: nn.Module) -> None:
    """Initialises the parameters that `init_resampler_weights` does not handle.

    query             normal, std 0.02
    scope embedding   normal, std 1: scopes differ from the start (std 0.02 for a single one)
    scope logits      0: equal weights
    """
    if isinstance(module, BranchesResampler):
        init.normal_(module.query, std=0.02)
    elif isinstance(module, BranchLayer):
        init.normal_(module.scope_embedding, std=1.0 if len(module.scope_embedding) > 1 else 0.02)
        if module.fusion == "static":
            init.zeros_(module.scope_logits)


__all__ = ["BranchesResampler", "Resampler", "init_branches_weights"]
