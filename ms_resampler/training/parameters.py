"""Which parameters are trained, with which learning rate and dtype."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

from ..folders import PROJECTOR_PREFIXES
from .adapters import add_adapters
from .liger import fuse_loss
from .loss import skip_unlearned
from .recipes import LearningRates, Recipe

_PREFIXES = {
    "tower": ("model.vision_tower.",),
    "projector": PROJECTOR_PREFIXES,
    "embeddings": ("model.language_model.embed_tokens.", "lm_head."),
    "llm": ("model.language_model.",),
}
_PEFT_PREFIX = "base_model.model."


def part_of(name: str) -> str:
    """The part of the model to which a parameter belongs, adapters or not.

    "model.vision_tower.encoder..." -> "tower"        "lm_head.weight" -> "embeddings"
    """
    name = name.removeprefix(_PEFT_PREFIX)
    return next(part for part, prefixes in _PREFIXES.items() if name.startswith(prefixes))


def freeze(model: nn.Module, rates: LearningRates) -> None:
    """Switches gradients on in the parts with a learning rate, off in the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(rates, part_of(name)) is not None)


def frozen_parts(model: nn.Module) -> list[nn.Module]:
    """The largest modules of which no parameter learns; `freeze` comes first."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return [part for child in model.children() for part in frozen_parts(child)]
    return [model] if any(True for _ in model.parameters()) else []


def eval_frozen(parts: list[nn.Module]) -> None:
    """Puts frozen parts into the mode that they are used in: no dropout, and no batch statistics that move.

    transformers checkpoints activations in training mode only; frozen layers through which gradients flow (the
    language model's, while the projector learns) are checkpointed here.
    """
    for part in parts:
        part.eval()
        for layer in part.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.forward = partial(checkpointed, layer)


def checkpointed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The output of a layer, whose activations are computed again in the backward; no cache could be filled twice."""
    kwargs |= {name: None for name in ("past_key_values", "layer_past") if name in kwargs}
    return layer._gradient_checkpointing_func(partial(type(layer).forward, layer, **kwargs), *args)


def prepare(model: Any, recipe: Recipe) -> Any:
    """The model with frozen parts, loss and adapters as the recipe has them, in the precision that it came in."""
    freeze(model, recipe.rates)
    if recipe.liger:
        fuse_loss(model)
    else:
        skip_unlearned(model)
    if recipe.adapters is None:
        return model
    set_seed(recipe.seed)  # adapters start at random
    return add_adapters(model, recipe.adapters, recipe.rates)


def set_precision(model: nn.Module, frozen: torch.dtype) -> None:
    """What learns is kept in float32, what is frozen in `frozen`.

    An update of 1e-5 is lost on a bfloat16 weight, and what is not updated needs no more than bfloat16. Batch norms
    take parameters of the type of their running statistics alone.
    """
    for module in model.modules():
        statistics = getattr(module, "running_mean", None)
        for parameter in module.parameters(recurse=False):
            # Four bits are packed into numbers of some type, which are not what they stand for.
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
                still = frozen if statistics is None else statistics.dtype
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else still)


def parameter_groups(model: nn.Module, rates: LearningRates, weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser's groups: one a part, and within it matrices (decayed) apart from everything else."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), _decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": getattr(rates, part),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in groups.items()
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix of weights: no bias or norm, no learned position, query, scope or table of words."""
    return name.endswith("weight") and len(_whole_shape(parameter)) > 1 and "embed" not in name


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Trainable and frozen parameters of each part."""
    counts = {part: {"trainable": 0, "frozen": 0} for part in ("tower", "projector", "llm", "embeddings")}
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["trainable" if parameter.requires_grad else "frozen"] += _whole_shape(parameter).numel()
    return counts


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of all of a parameter: ZeRO-3 leaves it empty, and four-bit weights are packed."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape if packed else getattr(parameter, "ds_shape", parameter.shape)
