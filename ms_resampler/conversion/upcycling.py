"""Turns one scope into several that compute the same function at the start.

The trained scope keeps its queries and prior and, by static fusion, all but about two millionths of the fusion weight.
A new scope starts as a copy with another sigma.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..branches_ms_resampler import BranchPrior
from ..configuration_ms_resampler import MSResamplerProjectorConfig

HEAD_START = 14.0  # fusion logit: a new scope has exp(-14), 0.8 millionths, of the weight
KEPT = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "query_grid",
    "visual_tokens",
    "pooled_mlp",
    "layer_norm_eps",
)


def upcycled_fields(old: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The fields of the projector with several scopes: those of the old one, and its scope among the new ones.

    Raises ValueError for fields that would change the function.
    """
    changed = [name for name in (*KEPT, "branch_form") if name in asked and asked[name] != getattr(old, name)]
    if changed:
        raise ValueError(f"Only the scopes can change when one becomes several: leave out {', '.join(changed)}.")
    default: Any = MSResamplerProjectorConfig(projector_type="ms_resampler_branches").scope_sigmas
    sigmas = list(asked.get("scope_sigmas") or default)
    if old.scope_sigmas[0] not in sigmas:
        sigmas.append(old.scope_sigmas[0])
    return {name: getattr(old, name) for name in KEPT} | {
        "projector_type": "ms_resampler_branches",
        "scope_sigmas": sigmas,
        "branch_form": (old.branch_form or {}) | {"fusion": "static"},
    }


def upcycling(old: Any, new: Any) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Tensor]]:
    """The transforms of the old projector's weights, by name, and the new weights."""
    scope, prior = list(new.scope_sigmas).index(old.scope_sigmas[0]), BranchPrior(new)
    transforms: dict[str, Callable[[Tensor], Tensor]] = {}
    added: dict[str, Tensor] = {}
    for layer in range(new.num_hidden_layers):
        at = f"model.projector.layers.{layer}"
        transforms[f"{at}.scope_embedding"] = lambda old_1D: old_1D.repeat(new.num_scopes, 1)
        for name, start in prior.state_dict().items():
            transforms[f"{at}.prior.{name}"] = partial(put_row, start, scope)
        added[f"{at}.scope_logits"] = HEAD_START * (torch.arange(new.num_scopes) == scope).float()
    return transforms, added


def put_row(table: Tensor, row: int, value: Tensor) -> Tensor:
    """A copy of a table with one row replaced."""
    changed = table.to(value.dtype, copy=True)
    changed[row] = value[0]
    return changed
