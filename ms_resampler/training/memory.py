"""Estimates the memory of a training step by running the real step on tensors without data."""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..processing_ms_resampler import OPTIONS
from ..tiles_ms_resampler import NONE, Tiling, lay_out
from ..towers_ms_resampler import flatten_patches, pair
from .adapters import add_adapters
from .parameters import count_parameters, eval_frozen, freeze, frozen_parts, set_precision
from .recipes import Recipe

NF4_BYTES = 4.127 / 8  # a 4-bit weight with its share of the double-quantised scales


@dataclass(frozen=True)
class BatchShape:
    """A batch on a device: records, tokens of each (visual ones included), and the pixels of its one image's sides.

    An image in `tiles`, rows and columns, has that many times these sides.
    """

    records: int
    length: int
    image_size: int | tuple[int, int]
    tiles: tuple[int, int] | None = None

    def layout(self, config: Any) -> tuple[Tiling | None, tuple[int, int]]:
        """How the image is cut, if it is, and its token grid."""
        size = pair(self.image_size)
        grid, patches = config.token_grid(size), config.patch_grid(size)
        if self.tiles is None:
            return None, grid
        if config.tower.takes_patches:
            raise ValueError("The tower reads pictures at their own proportions, without tiles: leave out --tiles.")
        budget = None if grid == patches else config.projector_config.visual_tokens
        sides = self.tiles[0] * size[0], self.tiles[1] * size[1]
        return lay_out(sides, size, patches, [self.tiles], budget, NONE, OPTIONS["overview_share"])

    def visual_tokens(self, config: Any) -> int:
        """The image's visual tokens."""
        tiling, grid = self.layout(config)
        return math.prod(grid) + (math.prod(tiling.overview) if tiling else 0)


@dataclass(frozen=True)
class Sizes:
    """What a step consists of: parameters by part, and bytes of activations on one device.

    `layer` counts the parameters of the largest layer, since sharding gathers one layer at a time; `rest` those outside
    layers (embeddings, norms), which stay gathered.
    """

    parts: dict[str, dict[str, int]]
    activations: int
    layer: int
    rest: int

    @property
    def trainable(self) -> int:
        """Parameters that learn."""
        return sum(part["trainable"] for part in self.parts.values())

    @property
    def frozen(self) -> int:
        """Parameters that do not."""
        return sum(part["frozen"] for part in self.parts.values())


def device_bytes(sizes: Sizes, recipe: Recipe, launcher: str, devices: int) -> dict[str, float]:
    """The bytes that each device holds, by kind.

    Trained parameters have float32 weights and two float32 moments (Adam). DDP replicates everything, and keeps
    gradients once more in its buckets. FSDP2 and ZeRO-3 shard weights, gradients and moments, and gather layers in 16
    bits, prefetching one. ZeRO-2 replicates 16-bit weights and shards the rest. 4-bit layers stay in four bits when
    gathered, and have no gradients.
    """
    narrow = 2 if recipe.bf16 else 4
    layers = sizes.parts["llm"]["frozen"] if recipe.four_bits else 0
    frozen = narrow * (sizes.frozen - layers) + NF4_BYTES * layers
    gathered = narrow * sizes.rest + sizes.layer * (2 * NF4_BYTES if recipe.four_bits else 2 * narrow + 4)
    kinds: dict[str, float] = {
        "weights": 4 * sizes.trainable + frozen,
        "gradients": 4 * sizes.trainable,
        "optimiser": 8 * sizes.trainable,
        "gathered": 4 * sizes.trainable * (devices > 1),
    }
    if launcher in ("fsdp2", "zero3"):
        kinds = {kind: size / devices for kind, size in kinds.items()} | {"gathered": gathered}
    elif launcher == "zero2":
        kinds["weights"] = narrow * sizes.trainable + frozen
        kinds["gradients"] = narrow * sizes.trainable / devices
        kinds["optimiser"] = 12 * sizes.trainable / devices
        kinds["gathered"] = 0
    return kinds | {"activations": sizes.activations}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations create; `peak` is the maximum."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.live = self.peak = 0
        for tensor in known:
            self.known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known[storage] = True
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size


def step_sizes(config: Any, recipe: Recipe, shape: BatchShape, launcher: str) -> Sizes:
    """Traces forward and backward of one batch, on a CPU's kernels, and counts.

    Raises ValueError if the recipe's text is shorter than an image's tokens.
    """
    narrow = torch.bfloat16 if recipe.bf16 else torch.float32
    with torch.device("meta"):
        model: Any = MSResamplerForConditionalGeneration(config).to(narrow)
        freeze(model, recipe.rates)
        whole = add_adapters(model, recipe.adapters, recipe.rates) if recipe.adapters else model
        if launcher == "ddp":  # the others give layers 16-bit weights, which autocast does not copy
            set_precision(whole, narrow)
    if recipe.activation_checkpointing:
        whole.activation_checkpointing_enable({"use_reentrant": False})
    parts, (layer, rest) = count_parameters(whole), unit_sizes(model)
    with FakeTensorMode():
        imagine_on_cpu(model)
        model.train()
        eval_frozen(frozen_parts(model))
        activations = trace(model, recipe, shape)
    return Sizes(parts, activations, layer, rest)


def imagine_on_cpu(model: nn.Module) -> None:
    """Makes tensors on the meta device use the kernels of a CPU, as a run would."""
    done: dict[Tensor, Tensor] = {}
    for module in model.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in tables:
            for name, old in tensors.items():
                if old is not None and old not in done:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    done[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    tensors[name] = done[old]


def trace(model: Any, recipe: Recipe, shape: BatchShape) -> int:
    """The peak bytes of activations, without gradients of parameters."""
    live = LiveBytes([*model.parameters(), *model.buffers()])

    def leave_out(parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage in live.known:
            live.live -= storage.nbytes()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(leave_out)
    with live:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            loss = forward(model, shape, recipe.liger)
        loss.backward()
    return live.peak


def forward(model: Any, shape: BatchShape, fused: bool) -> Tensor:
    """The model's loss, with its parts called one by one, because the whole model reads values, which are missing."""
    base = model.model
    features = base.get_image_features(**image_inputs(model.config, shape), return_dict=True)
    images = torch.stack(list(features.pooler_output))
    text = shape.length - images.shape[1]
    if text < 1:
        raise ValueError(f"{shape.length} tokens are too few for an image of {images.shape[1]} and an answer.")
    words = base.get_input_embeddings()(torch.zeros(shape.records, text, dtype=torch.long))
    if base.fusion is not None:
        everywhere = torch.ones(words.shape[:2], dtype=torch.bool)
        images, words = base.fusion(torch.stack(features.deepstack_features[0]), images, words, everywhere)
    hidden = base.language_model(inputs_embeds=torch.cat([images.to(words.dtype), words], dim=1)).last_hidden_state
    if fused:  # logits are computed and used in chunks
        loss = hidden.float().mean()
        return loss + GradientMadeAhead.apply(model.lm_head.weight) if model.lm_head.weight.requires_grad else loss
    learned = hidden[:, -text:].flatten(0, 1)  # at most: every word
    return model.loss_function(
        logits=model._logits(learned),
        labels=None,
        vocab_size=model.config.text_config.vocab_size,
        shift_labels=torch.zeros(len(learned), dtype=torch.long),
    )


class GradientMadeAhead(torch.autograd.Function):
    """Liger's loss for a trained head: computes the head's gradient in the forward pass, in float32, and keeps it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        """The head's part of the loss."""
        ctx.gradient = torch.zeros_like(weight, dtype=torch.float32)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        """Returns the stored gradient and releases it."""
        return ctx.__dict__.pop("gradient")


def image_inputs(config: Any, shape: BatchShape) -> dict[str, Any]:
    """One image per record. The values of grids are read, so these are arrays and lists, which are not traced."""
    size, (tiling, grid) = pair(shape.image_size), shape.layout(config)
    if tiling is not None:
        pixels = torch.zeros(shape.records * tiling.views, 3, *size)
        return {"pixel_values": pixels, "tilings": [tiling] * shape.records, "token_grids": [grid] * shape.records}
    pixels = torch.zeros(shape.records, 3, *size)
    if not config.tower.takes_patches:
        return {"pixel_values": pixels}
    grids = np.tile(config.patch_grid(size), (shape.records, 1))
    return flatten_patches(pixels, config.patch_size) | {"spatial_shapes": grids}


def unit_sizes(model: Any) -> tuple[int, int]:
    """Parameters of the largest layer, and of everything outside layers."""
    units = model._no_split_modules
    layers = [list(module.parameters()) for module in model.modules() if type(module).__name__ in units]
    inside = {id(parameter) for layer in layers for parameter in layer}
    largest = max(sum(parameter.numel() for parameter in layer) for layer in layers)
    return largest, sum(p.numel() for p in model.parameters() if id(p) not in inside)
