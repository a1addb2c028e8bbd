"""Vision towers of any type: the shapes of their outputs are found by running them.

`read_tower` builds the tower without weights (on the meta device), runs it on two images of its configured size, and
reads the shapes of its hidden states. There is no table of model names.
"""

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput

_MOST_PREFIX_TOKENS = 32  # more are not registers: YOLOS has 100 object tokens, after its patches
_DEFAULT_SIDE = 224  # for towers whose configuration has no image size, such as ResNet


@dataclass(frozen=True)
class TowerState:
    """The shape of one hidden state: C, (H, W) for images of the configured size, and pixels between patches.

    axis is the dimension of C: 1 in maps (B, C, H, W), 3 in maps (B, H, W, C), 2 in sequences (B, prefix + N, C).
    """

    width: int
    grid: tuple[int, int]
    stride: tuple[int, int]
    axis: int


@dataclass(frozen=True)
class Tower:
    """A vision tower's inputs and outputs.

    image_size: (height, width) that its position embeddings are made for.
    states: its hidden states in order, followed by its last_hidden_state if that differs in shape (EfficientNet).
    prefix_tokens: tokens before the patches (CLS, registers); None if unknown.
    takes_patches: whether it takes flattened patches with a mask and grids (SigLIP 2).
    must_interpolate: whether images of other sizes need `interpolate_pos_encoding=True`.
    can_stop_early: whether unread layers can be skipped.
    """

    image_size: tuple[int, int]
    states: tuple[TowerState, ...]
    prefix_tokens: int | None
    takes_patches: bool
    must_interpolate: bool
    can_stop_early: bool

    def unread_layers(self, layers: Sequence[int]) -> int:
        """The number of final layers that the states `layers` do not need."""
        count = len(self.states)
        return count - 1 - max(layer % count for layer in layers) if self.can_stop_early else 0


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a size that may be a single number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def read_tower(config: PretrainedConfig) -> Tower:
    """Inputs and outputs of a configuration's tower. Raises ValueError if it cannot be used as a vision tower."""
    kind: Any = type(config)
    return _read_tower(kind, config.to_json_string(use_diff=False))


@lru_cache(maxsize=64)
def _read_tower(kind: Any, fields: str) -> Tower:
    config = kind.from_dict(json.loads(fields))
    if kind not in MODEL_MAPPING:
        raise ValueError(f"The vision tower `{config.model_type}` is not a model that `AutoModel` can build.")
    return _run_without_weights(config)


class _FullMasks(TorchDispatchMode):
    """Makes `all` checks of masks pass on the meta device, which has no values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _run_without_weights(config: PretrainedConfig) -> Tower:
    size, name = _image_size(config), config.model_type
    with torch.device("meta"):
        tower = MODEL_MAPPING[type(config)](config).eval()
        takes = inspect.signature(tower.forward).parameters
        inputs: dict[str, Any] = {"pixel_values": torch.zeros(2, 3, *size)}
    if takes_patches := "spatial_shapes" in takes:
        inputs = flatten_patches(inputs["pixel_values"], config.patch_size)
    try:
        with _FullMasks():
            output = tower(**inputs, output_hidden_states=True, return_dict=True)
        shapes = [tuple(state.shape) for state in states_of(output)]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"The vision tower `{name}` does not take images: {' '.join(str(error).split())}") from error
    if any(len(shape) not in (3, 4) or shape[0] != 2 for shape in shapes):
        raise ValueError(f"The vision tower `{name}` puts out no patches image by image: {shapes[-1]} for 2 images.")
    patch = pair(getattr(config, "patch_size", None) or 1)
    states = tuple(_read_state(shape, size, patch) for shape in shapes)
    beside = {shape[1] - math.prod(state.grid) for shape, state in zip(shapes, states, strict=True) if state.axis == 2}
    prefix = beside.pop() if len(beside) == 1 else None if beside else 0
    if prefix is not None and not 0 <= prefix <= _MOST_PREFIX_TOKENS:
        prefix = None
    return Tower(
        image_size=size,
        states=states,
        prefix_tokens=prefix,
        takes_patches=takes_patches,
        must_interpolate="interpolate_pos_encoding" in takes,
        can_stop_early=len(set(shapes)) == 1 and states[0].axis == 2 and _can_stop_early(tower, inputs, shapes),
    )


def _image_size(config: PretrainedConfig) -> tuple[int, int]:
    if hasattr(config, "num_patches") and not hasattr(config, "image_size"):  # SigLIP 2 has their number
        return pair(math.isqrt(config.num_patches) * config.patch_size)
    timm = getattr(config, "pretrained_cfg", None) or {}  # of timm models in transformers' wrapper
    return pair(getattr(config, "image_size", None) or timm.get("input_size", [_DEFAULT_SIDE] * 2)[-2:])


def _read_state(shape: tuple[int, ...], size: tuple[int, int], patch: tuple[int, int]) -> TowerState:
    if len(shape) == 3:
        return TowerState(shape[2], (size[0] // patch[0], size[1] // patch[1]), patch, axis=2)

    def unevenness(grid: tuple[int, int]) -> float:  # height and width shrink equally, channels do not
        return abs(math.log(size[0] / grid[0]) - math.log(size[1] / grid[1]))

    channels_first, channels_last = pair(shape[2:]), pair(shape[1:3])
    axis = 1 if unevenness(channels_first) <= unevenness(channels_last) else 3
    grid = channels_first if axis == 1 else channels_last
    return TowerState(shape[axis], grid, (_stride(size[0], grid[0]), _stride(size[1], grid[1])), axis)


def _stride(side: int, cells: int) -> int:
    """The stride in pixels: a power of two if that fits, since padding may have added or removed a cell."""
    power = 2 ** round(math.log2(side / cells))
    return power if cells in (side // power, -(-side // power)) else side // cells


def _can_stop_early(tower: PreTrainedModel, inputs: dict[str, Any], shapes: list[tuple[int, ...]]) -> bool:
    try:
        make_layers_skippable(tower, len(shapes) - 2)
        with _FullMasks():
            output = tower(**inputs, output_hidden_states=True, return_dict=True, skip_unread=True)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    return [tuple(state.shape) for state in output.hidden_states] == shapes


def make_layers_skippable(tower: PreTrainedModel, count: int) -> None:
    """Makes the last `count` layers return their input when the tower is called with `skip_unread`.

    They are kept for checkpoints and for running the whole tower. Raises ValueError if the tower has no list of layers.
    """
    layers = layers_of(tower)
    for layer in layers[len(layers) - count :]:
        layer.forward = partial(_run_or_skip, layer)


def layers_of(tower: nn.Module) -> nn.ModuleList:
    """A tower's layers. Raises ValueError if it has no list of them."""
    config: Any = tower.config
    total = getattr(config, "num_hidden_layers", None)
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(lists) != 1:
        raise ValueError(f"`{config.model_type}` has {len(lists)} lists of {total} layers instead of one.")
    return lists[0]


def _run_or_skip(layer: nn.Module, hidden_states: Tensor, *args: Any, skip_unread: bool = False, **kwargs: Any):
    return hidden_states if skip_unread else type(layer).forward(layer, hidden_states, *args, **kwargs)


def states_of(output: ModelOutput) -> tuple[Tensor, ...]:
    """A tower's hidden states, as maps if it has maps, and its last_hidden_state if that differs in shape."""
    states = tuple(getattr(output, "reshaped_hidden_states", None) or output.hidden_states)
    last = output.last_hidden_state
    if states[-1] is not None and states[-1].ndim == last.ndim == 4 and states[-1].shape != last.shape:
        return (*states, last)
    return states


def patch_features(
    output: ModelOutput, tower: Tower, layers: Sequence[int], size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Patches (B, N, C) of images of (height, width), hidden states concatenated, and their grid (H, W).

    The finest map gives the grid; patches of coarser ones are repeated.
    """
    states, features, grids = states_of(output), [], []
    for layer in layers:
        state, shape = states[layer], tower.states[layer]
        if shape.axis == 2:
            grids.append((size[0] // shape.stride[0], size[1] // shape.stride[1]))
            features.append(state[:, tower.prefix_tokens :])
        else:
            map_BCHW = state if shape.axis == 1 else state.permute(0, 3, 1, 2)
            grids.append((map_BCHW.shape[2], map_BCHW.shape[3]))
            features.append(map_BCHW.flatten(2).mT)
    finest = max(grids)
    for n, grid in enumerate(grids):
        if grid != finest:
            features[n] = nn.functional.interpolate(features[n].mT.unflatten(2, grid), finest).flatten(2).mT
    return torch.cat(features, dim=-1), finest


def flatten_patches(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor]:
    """Images (B, 3, height, width) as SigLIP 2 reads them: patches (B, N, 3 * size^2), their mask and their grid."""
    rows, columns = (side // patch_size for side in pixel_values.shape[-2:])
    patches = pixel_values[..., : rows * patch_size, : columns * patch_size]
    patches = patches.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device),
        "spatial_shapes": torch.tensor([[rows, columns]], device="cpu"),  # the same for all images
    }


__all__ = ["Tower", "TowerState", "flatten_patches", "make_layers_skippable", "pair", "patch_features", "read_tower"]
