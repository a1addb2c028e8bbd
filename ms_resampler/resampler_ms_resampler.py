"""The multi-scope resampler: patch features (B, N, C) to visual tokens (B, M, T), in pure torch.

    u   = LN(x) W_in                                   patches at the resampler's width
    u   = LN(u + DWConv_3x3(u))                        each patch with its neighbours
    s_h = w_h . gelu(u W_s)                            one score for each head and patch
    o_h = softmax(s_h + B_h) (u W_v)                   B_h = -|a + d_h - p|^2 / (2 sigma_h^2), in anchor pitches
    z   = [S g_h o_h]_h W_o + z + cell mean of u       g = softmax over the S scopes of W_g LN([o_h]_h + z)
    z   = z + FFN(LN(z));   y = LN(z) W_out

Every token has an anchor `a`, the centre of its cell; z starts at zero. Each head belongs to one scope and gives the
patch at `p` the same score for all tokens: only its Gaussian prior B_h (0 in the global scope) decides which token
reads which patch. A Gaussian is a product over the two axes, so a head needs two small softmaxes, over the columns of
each row of patches and then over the rows, and no M x N matrix.

Shapes, as name suffixes: B images, N = H * W patches, M = Y * X visual tokens, S scopes, C vision width, D resampler
width, T text width, h heads, d head width; 1 is broadcast over the images.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .places_ms_resampler import (
    EvenPlaces,
    LinearFromZero,
    MovingSpace,
    ScopeMaps,
    as_map,
    as_tokens,
    centres,
    check_patches,
    mlp,
    spread,
)

Grid = tuple[int, int]


class ScopePrior(nn.Module):
    """The Gaussian prior: each head's learned offset from a token's anchor, and its learned width sigma."""

    sigma: Tensor

    def __init__(self, config):
        super().__init__()
        self.config = config
        sigma, offset = self.initial()
        self.register_buffer("sigma", sigma)  # (1, h), as configured
        self.log_scale = nn.Parameter(torch.zeros_like(sigma))  # learned
        self.offset = nn.Parameter(offset)  # (1, h, 2)

    def initial(self) -> tuple[Tensor, Tensor]:
        """The configured sigma and offset of every head."""
        sigmas, offsets = zip(*map(spread, self.config.scope_sigmas, self.config.scope_heads), strict=True)
        return torch.cat(sigmas)[None], torch.cat(offsets)[None]

    def precision(self, dtype: torch.dtype) -> Tensor:
        """1 / sigma^2, zero in the global scope, where its gradient is zero, too."""
        return self.sigma.to(dtype) ** -2 * torch.exp(-2 * self.log_scale.to(dtype))

    def forward(self, places: EvenPlaces) -> tuple[Tensor, Tensor]:
        """The prior's terms for rows (1, h, Y, H) and columns (1, h, 1, X, W), which add up to B.

        In moved space they differ between images and rows of patches: (B, h, Y, H) and (B, h, H, X, W).
        """
        dtype = places.y_BH.dtype
        y_1hY, x_1hX = (
            (centres(tokens, places.y_BH) - 0.5) * tokens + self.offset[..., axis, None].to(dtype)
            for axis, tokens in enumerate(places.token_grid)
        )
        half_1h11 = -0.5 * self.precision(dtype)[..., None, None]
        rows_BhYH = half_1h11 * (y_1hY[..., None] - places.y_BH[:, None, None]).square()
        away_BhHXW = x_1hX[:, :, None, :, None] - places.x_BHW[:, None, :, None]
        return rows_BhYH, half_1h11[..., None] * away_BhHXW.square()


class MeanOverHeads(nn.Module):
    """The attention of every scope (B, S, M, N), from all heads (B, h, M, N); a module, so that hooks see the heads."""

    def __init__(self, scope_heads: list[int]):
        super().__init__()
        self.scope_heads = scope_heads

    def forward(self, attention_BhMN: Tensor) -> Tensor:
        """The heads of the first scope come first."""
        return torch.stack([heads.mean(dim=1) for heads in attention_BhMN.split(self.scope_heads, dim=1)], dim=1)


class ScopeLayer(GradientCheckpointingLayer):
    """One layer: tokens z (B, M, D) read patches u (B, N, D) in every scope, and fuse the results."""

    def __init__(self, config):
        super().__init__()
        width, ffn_width = config.hidden_size, config.intermediate_size
        self.heads, self.scope_heads = config.num_attention_heads, config.scope_heads
        last = nn.Linear(width // 4, self.heads, bias=False)  # a bias would have no effect in the softmax
        self.score = nn.Sequential(nn.Linear(width, width // 4), nn.GELU(), last)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.prior, self.mean_over_heads = ScopePrior(config), MeanOverHeads(list(config.scope_heads))
        self.gate_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.gate = LinearFromZero(width, len(self.scope_heads), bias=False)
        self.ffn_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))

    def forward(
        self, z_BMD: Tensor, u_BND: Tensor, cell_BMD: Tensor, places: EvenPlaces, output_scopes: bool
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Returns the next tokens, with the cell means added, and maps; z is (1, M, D) in the first layer."""
        o_BMD, attention_BSMN = self.read(u_BND, places, output_scopes)
        g_BMS = self.gate(self.gate_norm(o_BMD + z_BMD)).softmax(dim=-1)
        # Repeated for each head by expand: indexing would copy the index to the GPU at every call.
        g_BMh = torch.cat([g.expand(-1, -1, n) for g, n in zip(g_BMS.split(1, -1), self.scope_heads, strict=True)], -1)
        o_BMhd = len(self.scope_heads) * g_BMh[..., None] * o_BMD.unflatten(-1, (self.heads, -1))
        z_BMD = self.o_proj(o_BMhd.flatten(-2)) + z_BMD + cell_BMD
        z_BMD = z_BMD + self.ffn(self.ffn_norm(z_BMD))
        maps = None if attention_BSMN is None else ScopeMaps(g_BMS.mT, attention_BSMN, places.of_tokens(len(u_BND)))
        return z_BMD, maps

    def read(self, u_BND: Tensor, places: EvenPlaces, output_scopes: bool) -> tuple[Tensor, Tensor | None]:
        """The heads' output (B, M, D) and, if requested, each scope's attention (B, S, M, N)."""
        score_BhN, value_BhNd = self.listen(u_BND)
        prior = self.prior(places)
        o_BhXYd, _ = self.filter(score_BhN, value_BhNd, prior, places.patch_grid)
        o_BMD = o_BhXYd.permute(0, 3, 2, 1, 4).flatten(3).flatten(1, 2)
        if not output_scopes:
            return o_BMD, None
        return o_BMD, self.mean_over_heads(self.logits(score_BhN, prior).softmax(dim=-1))

    def listen(self, u_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's score (B, h, N) and value (B, h, N, d) of every patch."""
        score_BhN = self.score(u_BND).mT.contiguous()  # the memory layout of the terms that are added
        return score_BhN, self.v_proj(u_BND).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def filter(
        self, score_BhN: Tensor, value_BhNd: Tensor, prior: tuple[Tensor, Tensor], patch_grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """What heads read (B, h, X, Y, d), by columns and rows, and the logits of rows (B, h, X, Y, H)."""
        rows_BhYH, columns_BhHXW = prior
        s_BhHXW = score_BhN.unflatten(-1, patch_grid)[..., None, :] + columns_BhHXW
        weight_BhHXW, (peak, at) = s_BhHXW.softmax(dim=-1), s_BhHXW.max(dim=-1, keepdim=True)
        mass_BhHX = (peak - weight_BhHXW.gather(-1, at).log()).squeeze(-1)  # logsumexp, from the softmax's results
        o_BhHXd = weight_BhHXW.to(value_BhNd.dtype) @ value_BhNd.unflatten(2, patch_grid)
        s_BhXYH = mass_BhHX.mT[..., None, :] + rows_BhYH[:, :, None]
        return s_BhXYH.softmax(dim=-1).to(value_BhNd.dtype) @ o_BhHXd.transpose(2, 3), s_BhXYH

    def logits(self, score_BhN: Tensor, prior: tuple[Tensor, Tensor]) -> Tensor:
        """Score and prior of every token and patch (B, h, M, N)."""
        rows_BhYH, columns_BhHXW = prior
        bias_BhYXHW = rows_BhYH[:, :, :, None, :, None] + columns_BhHXW.transpose(2, 3)[:, :, None]
        bias_BhMN = bias_BhYXHW.flatten(4).flatten(2, 3)
        return score_BhN[:, :, None].to(bias_BhMN.dtype) + bias_BhMN


class MultiScopeResampler(nn.Module):
    """Patch features of any grid to visual tokens of any grid, by the equations at the top of this file.

    With `pooled_mlp`, LLaVA's MLP of each cell's mean feature is added to y, and W_out starts at zero. With
    `moving_scopes`, space moves to the information (see places_ms_resampler.py), and z starts as the code of the mean
    place of the token's cell instead of zero.
    """

    layer_class = ScopeLayer

    def __init__(self, config, vision_width: int, text_width: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.input_norm = nn.LayerNorm(vision_width, eps=eps)
        self.input_proj = nn.Linear(vision_width, width)
        self.patch_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.patch_norm = nn.LayerNorm(width, eps=eps)
        if config.moving_scopes:
            self.space = MovingSpace(width)
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
        u_BND = self.mix(x_BNC, patch_grid)
        return self.resample(x_BNC, u_BND, *self.lay_out(u_BND, patch_grid, token_grid), output_scopes)

    def mix(self, x_BNC: Tensor, patch_grid: Grid) -> Tensor:
        """u (B, N, D): each patch with its neighbours."""
        u_BND = self.input_proj(self.input_norm(x_BNC))
        return self.patch_norm(u_BND + as_tokens(self.patch_conv(as_map(u_BND, patch_grid))))

    def lay_out(self, u_BND: Tensor, patch_grid: Grid, token_grid: Grid) -> tuple[EvenPlaces, Tensor]:
        """The places of patches, and z at the start, (B, M, D) or (1, M, D)."""
        if self.config.moving_scopes:
            return self.space(u_BND, patch_grid, token_grid)
        places = EvenPlaces.of(patch_grid, token_grid, u_BND)
        return places, u_BND.new_zeros(1, token_grid[0] * token_grid[1], u_BND.shape[-1])

    def resample(
        self, x_BNC: Tensor, u_BND: Tensor, places: EvenPlaces, z_BMD: Tensor, output_scopes: bool
    ) -> tuple[Tensor, ScopeMaps | None]:
        """Visual tokens (B, M, T) by all layers, and the last one's maps if requested."""
        cell_BMD, maps = places.cell_means(u_BND), None
        for layer in self.layers:
            z_BMD, maps = layer(z_BMD, u_BND, cell_BMD, places, output_scopes)
        y_BMT = self.output_proj(self.output_norm(z_BMD))
        if self.config.pooled_mlp:
            y_BMT = y_BMT + self.mlp(places.cell_means(x_BNC))
        return y_BMT, maps


@torch.no_grad()
def init_resampler_weights(module: nn.Module) -> None:
    """Initialises a module by its class; transformers calls this for every module with weights of its own.

    Linear, Conv2d   normal, std 1 / sqrt(inputs), which keeps the variance of the inputs; bias 0
    LinearFromZero   0: scopes start with equal weights, and beside a pooled MLP the resampler adds nothing
    LayerNorm        weight 1, bias 0
    ScopePrior       the configured scopes
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
    elif isinstance(module, ScopePrior):
        sigma, offset = module.initial()
        init.copy_(module.sigma, sigma)
        init.zeros_(module.log_scale)
        if module.offset is not None:  # see BranchPrior
            init.copy_(module.offset, offset)


__all__ = ["MultiScopeResampler", "ScopeMaps", "init_resampler_weights"]
