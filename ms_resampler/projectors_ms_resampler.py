"""All projectors by name, and the peers of the multi-scope resampler: published projectors with one interface.

`projector(x_BNC, patch_grid, token_grid)` maps patch features (B, N, C) to visual tokens (B, M, T) in raster order.
Each peer computes the same function as its original, and `original_names` maps its weights to the original's names, so
that published weights load. If the original is fixed to one grid and ours is not, the docstring says how it was
generalised. Shapes are named as in resampler_ms_resampler.py.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers import initialization as init
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2MLP, Idefics2PerceiverResampler

from .branches_ms_resampler import BranchesResampler, Resampler, init_branches_weights
from .clips_ms_resampler import ClipResampler
from .configuration_ms_resampler import PROJECTOR_TYPES, token_grid
from .places_ms_resampler import as_map, as_tokens, cell_means, check_patches, mlp
from .resampler_ms_resampler import MultiScopeResampler

Grid = tuple[int, int]


def patch_map(x_BNC: Tensor, grid: Grid) -> Tensor:
    """(B, N, C) -> (B, C, H, W). Raises ValueError if the number of features does not match the grid."""
    check_patches(x_BNC, grid)
    return as_map(x_BNC, grid)


def cell_shape(name: str, patch_grid: Grid, token_grid: Grid) -> Grid:
    """Patches in a token's cell (rows, columns). Raises ValueError if the cells are not equal."""
    if patch_grid[0] % token_grid[0] or patch_grid[1] % token_grid[1]:
        raise ValueError(
            f"`{name}` joins whole patches: a grid of {patch_grid[0]} x {patch_grid[1]} patches cannot become "
            f"{token_grid[0]} x {token_grid[1]} tokens; use a token grid that divides it."
        )
    return patch_grid[0] // token_grid[0], patch_grid[1] // token_grid[1]


def require_cell(name: str, fixed: Grid, patch_grid: Grid, token_grid: Grid) -> None:
    """Raises ValueError unless the cells have the size that the weights are made for."""
    cell = cell_shape(name, patch_grid, token_grid)
    if cell != fixed:
        raise ValueError(
            f"`{name}` has weights for cells of {fixed[0]} x {fixed[1]} patches, not of {cell[0]} x {cell[1]}: for "
            f"{patch_grid[0]} x {patch_grid[1]} patches set `visual_tokens` to "
            f"[{patch_grid[0] // fixed[0]}, {patch_grid[1] // fixed[1]}]."
        )


def default_cell(name: str, config) -> Grid:
    """The cell of the configured budget on the tower's native grid."""
    patches = config.native_patch_grid
    return cell_shape(name, patches, token_grid(config.projector_config.visual_tokens, patches))


def attention(width: int, heads: int) -> nn.MultiheadAttention:
    """Torch's multi-head attention, batches first. Raises ValueError if the heads do not divide the width."""
    if width % heads:
        raise ValueError(f"`num_attention_heads` {heads} does not divide the width {width} at which they attend.")
    return nn.MultiheadAttention(width, heads, batch_first=True)


def windows(x_BNC: Tensor, patch_grid: Grid, cell: Grid) -> Tensor:
    """The patches of every cell, in raster order of cells and within them: (B, M, patches of a cell, C)."""
    x_BHhWwC = x_BNC.unflatten(1, (patch_grid[0] // cell[0], cell[0], patch_grid[1] // cell[1], cell[1]))
    return x_BHhWwC.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def sincos_table(grid: Grid, width: int) -> Tensor:
    """2-D sin-cos codes of a grid's indices (rows * columns, width): columns first, base 10000 (MAE's)."""
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


def resize_table(table_PC: Tensor, grid: Grid, to: Grid) -> Tensor:
    """A table of positions for another grid, by bicubic interpolation in float32."""
    if grid == to:
        return table_PC
    table_1CHW = table_PC.float().mT.unflatten(1, grid)[None]
    resized_1CHW = F.interpolate(table_1CHW, size=to, mode="bicubic", align_corners=False)
    return as_tokens(resized_1CHW)[0].to(table_PC.dtype)


class MLPProjector(nn.Module):
    """LLaVA-1.5 (Liu et al., 2023): a token for every patch, through an MLP."""

    original_names = {"mlp": ""}

    def __init__(self, config):
        super().__init__()
        self.mlp = mlp(config.feature_width, config.text_width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_cell("mlp", (1, 1), patch_grid, token_grid)
        return self.mlp(x_BNC)


class AveragePoolProjector(MLPProjector):
    """The mean of each token's cell, through LLaVA's MLP; any grids."""

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        check_patches(x_BNC, patch_grid)
        return self.mlp(cell_means(x_BNC, patch_grid, token_grid))


class PixelShuffleProjector(nn.Module):
    """InternVL 1.5 (Chen et al., 2024): the patches of a cell side by side, through a norm and an MLP."""

    original_names = {"norm": "mlp1.0", "mlp.0": "mlp1.1", "mlp.2": "mlp1.3"}

    def __init__(self, config):
        super().__init__()
        self.cell = default_cell("pixel_shuffle", config)
        width = config.feature_width * self.cell[0] * self.cell[1]
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp(width, config.text_width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_cell("pixel_shuffle", self.cell, patch_grid, token_grid)
        return self.mlp(self.norm(windows(x_BNC, patch_grid, self.cell).flatten(2)))


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the map's mean."""

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Callable[[Tensor], Tensor] = F.silu,
        gate: Callable[[Tensor], Tensor] = torch.sigmoid,
    ):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.activation(self.fc1(x.mean((2, 3), keepdim=True)))))


class AbstractorBlock(nn.Module):
    """A bottleneck of 1 x 1, depthwise 3 x 3, squeeze-and-excite and 1 x 1, beside a shortcut."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), LayerNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), LayerNorm2d(width)
        self.se = SqueezeExcite(width, round(inputs / 4))
        self.conv3, self.norm3 = nn.Conv2d(width, width, 1, bias=False), LayerNorm2d(width)
        if inputs != width:
            self.shortcut, self.shortcut_norm = nn.Conv2d(inputs, width, 1, bias=False), LayerNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        y = self.se(F.silu(self.norm2(self.conv2(y))))
        y = self.norm3(self.conv3(y))
        return F.silu(y + (self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x))


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor (Cha et al., 2024): blocks of convolutions before and after average pooling.

    The table of positions, fixed to the tower's native grid in the original, is resized to other grids.
    """

    def __init__(self, config):
        super().__init__()
        inputs, width = config.feature_width, config.projector_config.hidden_size
        depth = config.projector_config.num_hidden_layers
        self.grid = config.native_patch_grid
        self.position = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], inputs))
        widths = [inputs] + [width] * (2 * depth)
        blocks = [AbstractorBlock(*pair) for pair in pairwise(widths)]
        self.before, self.after = nn.Sequential(*blocks[:depth]), nn.Sequential(*blocks[depth:])
        self.readout = mlp(width, config.text_width, nn.SiLU)

    @property
    def original_names(self) -> dict[str, str]:
        names = {"position": "pos_emb", "readout": "readout"}
        for ours, theirs in (("before", "net.0"), ("after", "net.2")):
            for number in range(len(self.before)):
                block, original = f"{ours}.{number}", f"{theirs}.b{number + 1}"
                names[f"{block}.se"] = f"{original}.se"
                for part in (1, 2, 3):
                    names[f"{block}.conv{part}"] = f"{original}.conv{part}.conv"
                    names[f"{block}.norm{part}"] = f"{original}.conv{part}.bn"
                names[f"{block}.shortcut"] = f"{original}.downsample.conv"
                names[f"{block}.shortcut_norm"] = f"{original}.downsample.bn"
        return names

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        x = patch_map(x_BNC + resize_table(self.position, self.grid, patch_grid), patch_grid)
        x = self.after(F.adaptive_avg_pool2d(self.before(x), token_grid))
        return self.readout(as_tokens(x))


class MobileBlock(nn.Module):
    """MobileNetV3's block (Howard et al., 2019; arXiv 1905.02244): depthwise 3 x 3, squeeze-and-excite, 1 x 1.

    Without a stride there is a shortcut. The gate's width is a quarter, rounded to a multiple of 8, and not down by
    more than a tenth.
    """

    def __init__(self, width: int):
        super().__init__()
        quarter = width // 4
        hidden = max(8, (quarter + 4) // 8 * 8)
        hidden += 8 if hidden < 0.9 * quarter else 0
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)
        self.norm1, self.norm2 = LayerNorm2d(width), LayerNorm2d(width)
        self.se = SqueezeExcite(width, hidden, F.relu, F.hardsigmoid)

    def forward(self, x: Tensor, stride: Grid = (1, 1)) -> Tensor:
        y = F.conv2d(x, self.conv1.weight, stride=stride, padding=1, groups=x.shape[1])
        y = self.norm2(self.conv2(self.se(F.hardswish(self.norm1(y)))))
        return x + y if stride == (1, 1) else y


class LDP(nn.Module):
    """MobileVLM's projector (Chu et al., 2023; arXiv 2312.16886): MLP, and two convolution blocks, one with a stride.

    The original's cells are 2 x 2; here any are possible.
    """

    original_names = {
        "mlp.0": "model.mlp.1",
        "mlp.2": "model.mlp.3",
        **{
            f"block{number}.{ours}": f"model.mb_block.{number}.block.{theirs}"
            for number in (1, 2)
            for ours, theirs in {"conv1": "0.0", "norm1": "0.1", "se": "1", "conv2": "2.0", "norm2": "2.1"}.items()
        },
    }

    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.mlp = mlp(config.feature_width, width)
        self.block1, self.block2 = MobileBlock(width), MobileBlock(width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        cell = cell_shape("ldp", patch_grid, token_grid)
        return as_tokens(self.block2(self.block1(patch_map(self.mlp(x_BNC), patch_grid)), cell))


class DeformableLayer(nn.Module):
    """Deformable DETR's decoder layer (Zhu et al., 2021; arXiv 2010.04159): queries read few points each.

    Queries attend to one another; then every head reads the patches at four points around the query's own, with
    weights, both computed from the query; then an FFN. A norm follows each.
    """

    points = 4

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.point_offsets = nn.Linear(width, heads * self.points * 2)
        self.point_weights = nn.Linear(width, heads * self.points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, z_BMD: Tensor, position_BMD: Tensor, place_M2: Tensor, x_BND: Tensor, grid: Grid) -> Tensor:
        q_BMD = z_BMD + position_BMD
        parts = self.q_proj(q_BMD), self.k_proj(q_BMD), self.v_proj(z_BMD)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z_BMD = self.norm1(z_BMD + self.o_proj(out))
        z_BMD = self.norm2(z_BMD + self.read(z_BMD + position_BMD, place_M2, x_BND, grid))
        return self.norm3(z_BMD + self.ffn(z_BMD))

    def read(self, q_BMD: Tensor, place_M2: Tensor, x_BND: Tensor, grid: Grid) -> Tensor:
        """Weighted bilinear samples at places (x, y) in the unit square; outside it there is nothing."""
        offset_BMhP2 = self.point_offsets(q_BMD).unflatten(-1, (self.heads, self.points, 2))
        place_BMhP2 = place_M2[:, None, None] + offset_BMhP2 / offset_BMhP2.new_tensor([grid[1], grid[0]])
        weight_BMhP = self.point_weights(q_BMD).unflatten(-1, (self.heads, self.points)).softmax(-1)
        # Every head of an image is a map of its own.
        value_BdHW = as_map(self.value_proj(x_BND), grid).unflatten(1, (self.heads, -1)).flatten(0, 1)
        place_BMP2 = (2 * place_BMhP2 - 1).transpose(1, 2).flatten(0, 1).to(value_BdHW.dtype)
        sample_BdMP = F.grid_sample(value_BdHW, place_BMP2, align_corners=False)
        out_BdM = (sample_BdMP * weight_BMhP.transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
        return self.output_proj(out_BdM.unflatten(0, (-1, self.heads)).flatten(1, 2).mT)


class DAbstractor(nn.Module):
    """Honeybee's D-Abstractor (Cha et al., 2024; arXiv 2312.06742): a deformable decoder of learned queries.

    Their places are learned, too, and their positions are the mean patches of their cells. The patches' table of
    positions, fixed to the tower's native grid in the original, is resized to other grids.
    """

    def __init__(self, config):
        super().__init__()
        projector, width = config.projector_config, config.projector_config.hidden_size
        self.grid, self.query_grid = config.native_patch_grid, tuple(projector.query_grid)
        queries = self.query_grid[0] * self.query_grid[1]
        same = config.feature_width == width
        self.input_proj = nn.Identity() if same else nn.Linear(config.feature_width, width)
        self.position = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], width))
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.place = nn.Parameter(patch_places(self.query_grid, self.grid))
        self.layers = nn.ModuleList(
            DeformableLayer(width, projector.num_attention_heads, projector.intermediate_size)
            for _ in range(projector.num_hidden_layers)
        )
        same = config.text_width == width
        self.output_proj = nn.Identity() if same else nn.Linear(width, config.text_width)

    @property
    def original_names(self) -> dict[str, str]:
        parts = {
            **{f"{name}_proj": f"self_attn.{name}_proj" for name in "qkv"},
            "o_proj": "self_attn.out_proj",
            "norm1": "self_attn_layer_norm",
            "point_offsets": "encoder_attn.sampling_offsets",
            "point_weights": "encoder_attn.attention_weights",
            "value_proj": "encoder_attn.value_proj",
            "output_proj": "encoder_attn.output_proj",
            "norm2": "encoder_attn_layer_norm",
            "ffn.0": "fc1",
            "ffn.2": "fc2",
            "norm3": "final_layer_norm",
        }
        names = {
            "input_proj": "input_proj.0",
            "position": "v_pos_emb",
            "query": "query_position_embeddings.weight",
            "place": "reference_points",
            "output_proj": "output_proj",
        }
        for n in range(len(self.layers)):
            names |= {f"layers.{n}.{ours}": f"layers.{n}.{theirs}" for ours, theirs in parts.items()}
        return names

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_queries("d_abstractor", len(self.query), token_grid)
        check_patches(x_BNC, patch_grid)
        x_BND = self.input_proj(x_BNC) + resize_table(self.position, self.grid, patch_grid)
        position_BMD = cell_means(x_BND, patch_grid, self.query_grid)
        z_BMD = self.query.expand(x_BNC.shape[0], -1, -1)
        for layer in self.layers:
            z_BMD = layer(z_BMD, position_BMD, self.place, x_BND, patch_grid)
        return self.output_proj(z_BMD)


def patch_places(grid: Grid, patch_grid: Grid) -> Tensor:
    """Places (x, y) in the unit square of a grid that spans the centres of the patches (rows * columns, 2)."""
    y, x = (torch.linspace(0.5, patches - 0.5, n) / patches for n, patches in zip(grid, patch_grid, strict=True))
    return torch.cartesian_prod(y, x).flip(-1)


class LDPv2(nn.Module):
    """MobileVLM V2's projector (Chu et al., 2024): MLP, average pooling, and a depthwise convolution beside it.

    The original has 12 x 12 tokens; here any token grid works.
    """

    original_names = {"mlp": "mlp.mlp", "positions": "peg.peg.0"}

    def __init__(self, config):
        super().__init__()
        width = config.text_width
        self.mlp = mlp(config.feature_width, width)
        self.positions = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        x = F.adaptive_avg_pool2d(patch_map(self.mlp(x_BNC), patch_grid), token_grid)
        return as_tokens(x + self.positions(x))


class TokenPacker(nn.Module):
    """TokenPacker (Li et al., 2024): every token is a bilinear sample of the last layer that attends to its own cell.

    Queries come from the last of the tower's layers, keys and values from all of them. The width, 1024 in the original,
    is configurable, and so is the cell.
    """

    kind = "token_packer"
    original_names = {
        "q_proj": "q_proj_1",
        "q_norm": "ln_q_1",
        "k_proj": "k_proj_1",
        "k_norm": "ln_k_1",
        "v_proj": "v_proj_1",
        "v_norm": "ln_v_1",
        "attention": "clip_attn",
        "mlp": "mlp",
    }
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, config):
        super().__init__()
        width = config.projector_config.hidden_size
        self.query_width = config.feature_states[-1].width
        self.q_proj, self.q_norm = nn.Linear(self.query_width, width, bias=False), nn.LayerNorm(width, eps=1e-6)
        self.k_proj, self.k_norm = mlp(config.feature_width, width), nn.LayerNorm(width, eps=1e-6)
        self.v_proj, self.v_norm = mlp(config.feature_width, width), nn.LayerNorm(width, eps=1e-6)
        self.attention = attention(width, config.projector_config.num_attention_heads)
        self.mlp = mlp(width, config.text_width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        return self.pack(x_BNC[..., -self.query_width :], x_BNC, patch_grid, token_grid)

    def pack(self, last_BNC: Tensor, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        """Tokens that start as samples of `last_BNC` and read `x_BNC`."""
        cell = cell_shape(self.kind, patch_grid, token_grid)
        last_BCHW = patch_map(last_BNC, patch_grid)
        sample_BCHW = F.interpolate(last_BCHW.float(), size=token_grid, mode="bilinear").to(x_BNC.dtype)
        query = self.q_norm(self.q_proj(self.prepare(sample_BCHW)))
        key = windows(self.k_norm(self.k_proj(x_BNC)), patch_grid, cell)
        value = windows(self.v_norm(self.v_proj(x_BNC)), patch_grid, cell)
        # Every cell is a separate sequence with one query.
        out = self.attention(query.flatten(0, 1)[:, None], key.flatten(0, 1), value.flatten(0, 1), need_weights=False)[
            0
        ]
        return self.mlp(out[:, 0].unflatten(0, query.shape[:2]))

    def prepare(self, sample_BCHW: Tensor) -> Tensor:
        """The samples as they are projected to queries."""
        return as_tokens(sample_BCHW)


class DeltaProjection(nn.Module):
    """gelu(x (W + (U V)^T)^T): a matrix with a low-rank update, without a bias."""

    def __init__(self, inputs: int, outputs: int, rank: int = 16):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.u, self.v = nn.Parameter(torch.zeros(inputs, rank)), nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.base(x) + x @ self.u @ self.v)


class DeltaBlock(nn.Module):
    """Attention among the tokens in three quarters of the width, and a convolution of its output in the rest.

    Heads are 32 wide, or the widest below that divide a quarter of the width.
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        local, wide = width // 4, width - width // 4
        head = max(size for size in range(1, 33) if local % size == 0)
        self.heads = wide // head
        self.input = nn.Conv2d(inputs, wide, 1, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(wide, wide) for _ in range(4))
        self.local_input = nn.Conv2d(wide, local, 1, bias=False)
        self.local_conv = nn.Conv2d(local, local, 3, padding=1, groups=local // head, bias=False)
        self.local_norm = LayerNorm2d(local)
        self.local_output = nn.Conv2d(local, local, 1, bias=False)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        tokens = self.norm2(self.norm1(as_tokens(x)))
        q, k, v = (
            project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + as_map(self.o_proj(out), (x.shape[2], x.shape[3]))
        y = self.local_input(x)
        y = y + self.local_output(F.relu(self.local_norm(self.local_conv(y))))
        x = torch.cat([x, y], dim=1)
        return x + self.mlp(x)


class DeltaLLaVA(TokenPacker):
    """Delta-LLaVA (Zamini and Shukla, 2025; arXiv 2512.18910): TokenPacker with low-rank updates of its projections.

    Its queries are samples that have seen one another, with positions; the table of these, fixed to the tower's native
    grid, is resized to the token grid.
    """

    kind = "delta_llava"
    original_names = {
        "block.input": "combined_block.ntb.patch_embed.conv",
        "block.norm1": "combined_block.ntb.norm_mhsa",
        "block.norm2": "combined_block.ntb.e_mhsa.norm",
        "block.q_proj": "combined_block.ntb.e_mhsa.q",
        "block.k_proj": "combined_block.ntb.e_mhsa.k",
        "block.v_proj": "combined_block.ntb.e_mhsa.v",
        "block.o_proj": "combined_block.ntb.e_mhsa.proj",
        "block.local_input": "combined_block.ntb.projection.conv",
        "block.local_conv": "combined_block.ntb.mhca.group_conv3x3",
        "block.local_norm": "combined_block.ntb.mhca.norm",
        "block.local_output": "combined_block.ntb.mhca.projection",
        "block.mlp.0": "combined_block.ntb.mlp.conv1",
        "block.mlp.2": "combined_block.ntb.mlp.conv2",
        **{f"{name}_proj.base": f"{name}_proj_1.shared_weight" for name in "qkv"},
        **{f"{name}_proj.u": f"{name}_proj_1.U" for name in "qkv"},
        **{f"{name}_proj.v": f"{name}_proj_1.V" for name in "qkv"},
        **{f"{name}_norm": f"{name}_proj_1.norm" for name in "qkv"},
        "attention": "clip_attn",
        "mlp": "mlp",
    }
    position: Tensor

    def __init__(self, config):
        super().__init__(config)
        width, self.grid = config.projector_config.hidden_size, config.native_patch_grid
        self.block, self.q_proj = DeltaBlock(self.query_width, width), DeltaProjection(width, width)
        self.k_proj, self.v_proj = (DeltaProjection(config.feature_width, width) for _ in range(2))
        self.register_buffer("position", sincos_table(self.grid, width), persistent=False)

    def prepare(self, sample_BCHW: Tensor) -> Tensor:
        x_BCHW = self.block(sample_BCHW)
        grid = x_BCHW.shape[2], x_BCHW.shape[3]
        return as_tokens(x_BCHW) + resize_table(self.position.to(x_BCHW.dtype), self.grid, grid)


class MQTResampler(nn.Module):
    """MQT (Hu et al., 2024): the first M learned queries of a raster; keys are positions alone, values the patches.

    So a token's attention does not depend on the image. Smaller budgets use the first M queries.
    """

    original_names = {
        "query": "query",
        "position": "pos_embed",
        "q_norm": "ln_q",
        "k_norm": "ln_k",
        "v_norm": "ln_v",
        "attention": "attn",
        "output": "proj",
    }
    position: Tensor

    def __init__(self, config):
        super().__init__()
        width, self.grid = config.feature_width, tuple(config.projector_config.query_grid)
        self.query = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], width))
        self.register_buffer("position", sincos_table(self.grid, width))
        self.q_norm, self.k_norm, self.v_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = attention(width, config.projector_config.num_attention_heads)
        self.output = nn.Parameter(torch.zeros(width, config.text_width))

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        tokens = token_grid[0] * token_grid[1]
        if tokens > len(self.query):
            raise ValueError(f"`mqt` has {len(self.query)} queries (`query_grid`), so no more tokens than that.")
        position_QC = self.position.to(x_BNC.dtype)  # a buffer may stay in float32
        query = self.q_norm(self.query[:tokens] + position_QC[:tokens])
        key = self.k_norm(resize_table(position_QC, self.grid, patch_grid))
        query, key = (t.expand(x_BNC.shape[0], -1, -1) for t in (query, key))
        return self.attention(query, key, self.v_norm(x_BNC), need_weights=False)[0] @ self.output


class QwenResampler(nn.Module):
    """Qwen-VL's resampler (Bai et al., 2023): a fixed grid of learned queries attends to all patches once."""

    original_names = {
        "query": "query",
        "position": "pos_embed",
        "kv_proj": "kv_proj",
        "q_norm": "ln_q",
        "kv_norm": "ln_kv",
        "attention": "attn",
        "output_norm": "ln_post",
        "output": "proj",
    }
    position: Tensor

    def __init__(self, config):
        super().__init__()
        width, self.grid = config.projector_config.hidden_size, tuple(config.projector_config.query_grid)
        self.query = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], width))
        self.register_buffer("position", sincos_table(self.grid, width))
        same = config.feature_width == width
        self.kv_proj = nn.Identity() if same else nn.Linear(config.feature_width, width, bias=False)
        self.q_norm, self.kv_norm, self.output_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = attention(width, config.projector_config.num_attention_heads)
        self.output = nn.Parameter(torch.zeros(width, config.text_width))

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_queries("qwen_resampler", len(self.query), token_grid)
        x_BND = self.kv_norm(self.kv_proj(x_BNC))
        position_MD = self.position.to(x_BND.dtype)  # a buffer may stay in float32
        query = (self.q_norm(self.query) + position_MD).expand(x_BND.shape[0], -1, -1)
        key = x_BND + resize_table(position_MD, self.grid, patch_grid)
        out_BMD = self.attention(query, key, x_BND, need_weights=False)[0]
        return self.output_norm(out_BMD) @ self.output


def require_queries(name: str, queries: int, token_grid: Grid) -> None:
    """Raises ValueError unless there is a query for every token."""
    if token_grid[0] * token_grid[1] != queries:
        raise ValueError(
            f"`{name}` gives one token for each of its {queries} queries (`query_grid`), not {token_grid[0]} x "
            f"{token_grid[1]}: its budget cannot be changed when it is called."
        )


class LLaVAMini(nn.Module):
    """LLaVA-Mini's compressor (Zhang et al., 2025; arXiv 2501.03895): learned queries read all patches before the MLP.

    Keys have the queries' positions, resized to the patches. Its pre-fusion is in fusion_ms_resampler.py.
    """

    original_names = {
        "query": "compressor.query",
        "position": "compressor.pos_embed",
        "q_norm": "compressor.ln_q",
        "kv_norm": "compressor.ln_kv",
        "attention": "compressor.attn",
        "mlp": "mm_projector",
    }
    position: Tensor

    def __init__(self, config):
        super().__init__()
        width, self.grid = config.feature_width, tuple(config.projector_config.query_grid)
        self.query = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], width))
        self.register_buffer("position", sincos_table(self.grid, width))
        self.q_norm, self.kv_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention(width, config.projector_config.num_attention_heads)
        self.mlp = mlp(width, config.text_width)

    def forward(
        self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid, with_patches: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Visual tokens and, with `with_patches`, the patches through the same MLP (B, N, T)."""
        require_queries("llava_mini", len(self.query), token_grid)
        check_patches(x_BNC, patch_grid)
        position_MC = self.position.to(x_BNC.dtype)  # a buffer may stay in float32
        query = (self.q_norm(self.query) + position_MC).expand(x_BNC.shape[0], -1, -1)
        value = self.kv_norm(x_BNC)
        key = value + resize_table(position_MC, self.grid, patch_grid)
        y_BMT = self.mlp(self.attention(query, key, value, need_weights=False)[0])
        return (y_BMT, self.mlp(x_BNC)) if with_patches else y_BMT


class SAEP(nn.Module):
    """SAEP (Qian et al., 2024): several layers joined, and a strided convolution beside average pooling."""

    original_names = {
        "input_proj": "point_conv",
        "input_norm": "norm1",
        "conv": "conv1",
        "conv_norm": "norm2",
        "pool_norm": "norm3",
    }

    def __init__(self, config):
        super().__init__()
        width, self.cell = config.text_width, default_cell("saep", config)
        self.input_proj, self.input_norm = nn.Linear(config.feature_width, width), nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, self.cell, stride=self.cell, groups=width)
        self.conv_norm, self.pool_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_cell("saep", self.cell, patch_grid, token_grid)
        x = patch_map(self.input_norm(self.input_proj(x_BNC)), patch_grid)
        return self.conv_norm(as_tokens(self.conv(x))) + self.pool_norm(as_tokens(F.avg_pool2d(x, self.cell)))


class PerceiverLayer(nn.Module):
    """Latents attend patches and themselves; then a feed-forward layer. No biases."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.x_norm, self.z_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.kv_proj = nn.Linear(width, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, z_BMC: Tensor, x_BNC: Tensor) -> Tensor:
        latents = self.z_norm(z_BMC)
        key, value = self.kv_proj(torch.cat([self.x_norm(x_BNC), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q_proj(latents), key, value))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z_BMC = z_BMC + self.o_proj(out)
        return z_BMC + self.ffn(self.ffn_norm(z_BMC))


class PerceiverResampler(nn.Module):
    """Flamingo's perceiver (Alayrac et al., 2022; OpenFlamingo): latents without positions, in several layers.

    Heads are `hidden_size / num_attention_heads` wide. A linear layer follows where the widths differ.
    """

    def __init__(self, config):
        super().__init__()
        width, text_width, projector = config.feature_width, config.text_width, config.projector_config
        rows, columns = projector.query_grid
        self.latents = nn.Parameter(torch.zeros(rows * columns, width))
        heads = projector.num_attention_heads
        self.layers = nn.ModuleList(
            PerceiverLayer(width, heads, projector.hidden_size // heads) for _ in range(projector.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.output_proj = nn.Identity() if width == text_width else nn.Linear(width, text_width)

    @property
    def original_names(self) -> dict[str, str]:
        parts = {
            "x_norm": "0.norm_media",
            "z_norm": "0.norm_latents",
            "q_proj": "0.to_q",
            "kv_proj": "0.to_kv",
            "o_proj": "0.to_out",
            "ffn_norm": "1.0",
            "ffn.0": "1.1",
            "ffn.2": "1.3",
        }
        names = {"latents": "latents", "norm": "norm"}
        for n in range(len(self.layers)):
            names |= {f"layers.{n}.{ours}": f"layers.{n}.{theirs}" for ours, theirs in parts.items()}
        return names

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_queries("perceiver", len(self.latents), token_grid)
        z_BMC = self.latents.expand(x_BNC.shape[0], -1, -1)
        for layer in self.layers:
            z_BMC = layer(z_BMC, x_BNC)
        return self.output_proj(self.norm(z_BMC))


class Idefics2Latents(Idefics2PerceiverResampler):
    """Idefics2's perceiver, but its latents start as noise: from ones, they would stay alike."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.latents, std=1.0)


class Idefics2Perceiver(nn.Module):
    """Idefics2's connector (Laurençon et al., 2024), of transformers' modules: a gated MLP, then a perceiver.

    The MLP is `intermediate_size` wide, and heads are `hidden_size / num_attention_heads` wide.
    """

    original_names = {"modality_projection": "modality_projection", "perceiver_resampler": "perceiver_resampler"}

    def __init__(self, config):
        super().__init__()
        projector, width = config.projector_config, config.text_width
        heads = projector.num_attention_heads
        self.modality_projection = Idefics2MLP(config.feature_width, projector.intermediate_size, width, "silu")
        self.perceiver_resampler = Idefics2Latents(
            Idefics2PerceiverConfig(
                hidden_size=width,
                resampler_n_latents=projector.query_grid[0] * projector.query_grid[1],
                resampler_depth=projector.num_hidden_layers,
                resampler_n_heads=heads,
                resampler_head_dim=projector.hidden_size // heads,
                num_key_value_heads=projector.num_key_value_heads or (heads if heads % 4 else heads // 4),
            )
        )

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_queries("idefics2_perceiver", len(self.perceiver_resampler.latents), token_grid)
        everywhere_BN = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool)
        return self.perceiver_resampler(self.modality_projection(x_BNC), attention_mask=everywhere_BN)


class QFormer(nn.Module):
    """BLIP-2's Q-Former (Li et al., 2023): transformers' BERT of queries, every second layer sees patches."""

    original_names = {"query": "query_tokens", "qformer": "qformer", "output_proj": "language_projection"}

    def __init__(self, config):
        super().__init__()
        projector = config.projector_config
        width, (rows, columns) = projector.hidden_size, projector.query_grid
        self.query = nn.Parameter(torch.zeros(1, rows * columns, width))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=projector.num_hidden_layers,
                num_attention_heads=projector.num_attention_heads,
                intermediate_size=projector.intermediate_size,
                encoder_hidden_size=config.feature_width,
            )
        )
        self.output_proj = nn.Linear(width, config.text_width)

    def forward(self, x_BNC: Tensor, patch_grid: Grid, token_grid: Grid) -> Tensor:
        require_queries("q_former", self.query.shape[1], token_grid)
        query = self.query.expand(x_BNC.shape[0], -1, -1)
        return self.output_proj(self.qformer(query, encoder_hidden_states=x_BNC).last_hidden_state)


# With scopes: constructed from the projector's configuration and the two widths; called with `output_scopes`.
SCOPED_PROJECTORS: dict[str, type[nn.Module]] = {
    "ms_resampler": MultiScopeResampler,
    "ms_resampler_branches": BranchesResampler,
    "resampler": Resampler,
}
# Peers: constructed from the model's configuration.
PROJECTORS: dict[str, type[nn.Module]] = {
    "mlp": MLPProjector,
    "avg_pool": AveragePoolProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "c_abstractor": CAbstractor,
    "d_abstractor": DAbstractor,
    "ldp": LDP,
    "ldp_v2": LDPv2,
    "token_packer": TokenPacker,
    "delta_llava": DeltaLLaVA,
    "mqt": MQTResampler,
    "llava_mini": LLaVAMini,
    "saep": SAEP,
    "qwen_resampler": QwenResampler,
    "perceiver": PerceiverResampler,
    "idefics2_perceiver": Idefics2Perceiver,
    "q_former": QFormer,
}
# Peers with weights for one grid of patches or tokens: in a tiled picture they read every view on its own.
OWN_GRID = frozenset(
    (
        *("pixel_shuffle", "saep", "ldp", "token_packer", "delta_llava"),  # cells of whole patches
        *("d_abstractor", "llava_mini", "qwen_resampler", "perceiver", "idefics2_perceiver", "q_former"),  # queries
    )
)
# Names of parameters and buffers in earlier versions, and today's.
EARLIER_NAMES = {
    "query_1DHW": "query",
    "scope_embedding_GD": "scope_embedding",
    "sigma_Gh": "sigma",
    "log_scale_Gh": "log_scale",
    "offset_Gh2": "offset",
    "gate_S": "scope_logits",
    "position_NC": "position",
    "query_QC": "query",
    "position_QC": "position",
    "output_CT": "output",
    "query_MD": "query",
    "position_MD": "position",
    "output_DT": "output",
    "latents_MC": "latents",
    "query_1MD": "query",
}


def rays(heads: int, points: int) -> Tensor:
    """Points (x, y) on rays in as many directions as heads, on squares of half side 1, 2, ... (heads, points, 2)."""
    angle_h = torch.arange(heads) * (2 * math.pi / heads)
    ray_h2 = torch.stack([angle_h.cos(), angle_h.sin()], dim=-1)
    ray_h2 = ray_h2 / ray_h2.abs().amax(-1, keepdim=True)
    return ray_h2[:, None] * torch.arange(1, points + 1)[:, None]


def register_projector(name: str, projector: type[nn.Module], fields_of: str = "peer") -> None:
    """Registers a projector of your own as a `projector_type`; call it before a configuration uses the name.

    `fields_of` is the type whose configuration fields, constructor and call it shares: "peer" (constructed from the
    model's configuration), "ms_resampler", "ms_resampler_branches" or "resampler". Raises ValueError if the name is
    taken.
    """
    if name in PROJECTOR_TYPES:
        raise ValueError(f"There is a projector `{name}` already: register yours under another name.")
    PROJECTOR_TYPES[name] = fields_of
    (PROJECTORS if fields_of == "peer" else SCOPED_PROJECTORS)[name] = projector


def build_projector(config) -> nn.Module:
    """The projector that a model's configuration names."""
    fields = config.projector_config
    if fields.kind == "peer":
        projector = PROJECTORS[fields.projector_type](config)
    else:
        made = ClipResampler if fields.video_form == "scopes" else SCOPED_PROJECTORS[fields.projector_type]
        projector = made(fields, config.feature_width, config.text_width)
    projector.register_load_state_dict_pre_hook(_rename_earlier)
    return projector


def name_of_today(name: str) -> str:
    """Today's name of a weight, given that or the name in an earlier version."""
    path, _, leaf = name.rpartition(".")
    return ".".join(filter(None, (path, EARLIER_NAMES.get(leaf, leaf))))


def _rename_earlier(projector: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Lets `load_state_dict` accept names of earlier versions; `from_pretrained` uses `key_mapping` instead."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[name_of_today(name)] = state.pop(name)


def rename(names: Iterable[str], table: dict[str, str]) -> dict[str, str]:
    """Each of our names with the original's, by the longest prefix in the table. Raises ValueError if there is none."""
    renamed = {}
    for name in names:
        prefixes = [prefix for prefix in table if name == prefix or name.startswith(f"{prefix}.")]
        if not prefixes:
            raise ValueError(f"The original of this projector has no weight like `{name}`.")
        prefix = max(prefixes, key=len)
        renamed[name] = (table[prefix] + name.removeprefix(prefix)).removeprefix(".")
    return renamed


@torch.no_grad()
def init_projector_weights(module: nn.Module) -> None:
    """Initialises a peer's parameters; linear layers start as ours, or as their class does.

    packed attention weights     Xavier uniform, bias 0
    low-rank updates             Xavier uniform       deformable points       on rays, one for each head
    learned queries, positions   normal, std 0.02     a perceiver's latents   normal, std 1
    output matrices              normal, std 1 / sqrt(inputs)              tables of positions   2-D sin-cos
    """
    init_branches_weights(module)
    if isinstance(module, nn.MultiheadAttention):
        init.xavier_uniform_(module.in_proj_weight)
        init.zeros_(module.in_proj_bias)
    elif isinstance(module, (MQTResampler, QwenResampler)):
        init.normal_(module.query, std=0.02)
        init.normal_(module.output, std=module.output.shape[0] ** -0.5)
    elif isinstance(module, DeltaProjection):
        init.xavier_uniform_(module.u)
        init.xavier_uniform_(module.v)
    elif isinstance(module, LLaVAMini):
        init.normal_(module.query, std=0.02)
    elif isinstance(module, CAbstractor):
        init.normal_(module.position, std=0.02)
    elif isinstance(module, DeformableLayer):
        init.zeros_(module.point_offsets.weight)
        init.copy_(module.point_offsets.bias, rays(module.heads, module.points).flatten())
        init.zeros_(module.point_weights.weight)
    elif isinstance(module, DAbstractor):
        init.normal_(module.position, std=0.02)
        init.normal_(module.query, std=0.02)
        init.copy_(module.place, patch_places(module.query_grid, module.grid))
    elif isinstance(module, PerceiverResampler):
        init.normal_(module.latents, std=1.0)
    elif isinstance(module, QFormer):
        init.normal_(module.query, std=0.02)
    if isinstance(module, (MQTResampler, QwenResampler, DeltaLLaVA, LLaVAMini)):
        init.copy_(module.position, sincos_table(module.grid, module.position.shape[1]))


__all__ = [
    "OWN_GRID",
    "PROJECTORS",
    "SCOPED_PROJECTORS",
    "build_projector",
    "init_projector_weights",
    "name_of_today",
    "register_projector",
]
