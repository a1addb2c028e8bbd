"""Liger's fused loss: head and cross-entropy in chunks, so that all logits never exist at once."""

import os
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..modeling_ms_resampler import MSResamplerCausalLMOutputWithPast
from .collate import IGNORED

# weight (vocabulary, T), hidden states (n, T), targets (n), cap of the logits or None -> the sum of their losses
FusedLoss = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def fuse_loss(model: Any, fused: FusedLoss | None = None) -> None:
    """Makes a MSResamplerForConditionalGeneration's forward return only the loss, without logits.

    Raises ValueError if Liger's kernels cannot run, or if the language model's head has a bias.
    """
    config = model.config
    if model.lm_head.bias is not None:
        kind = config.text_config.model_type
        raise ValueError(f"Liger's fused loss takes no head with a bias, as {kind} has one: leave --liger out.")
    fused = fused or liger_loss()

    def forward(self: Any, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        outputs = self.model(prompt_mask=labels == IGNORED, **inputs)
        hidden = outputs.last_hidden_state[:, :-1].flatten(0, 1)
        if config.logit_scale != 1:
            hidden = hidden * config.logit_scale
        targets = self.words_only(labels, outputs.kept_positions)[:, 1:].flatten()
        total = fused(self.lm_head.weight.to(hidden.dtype), hidden, targets, config.logit_cap)
        return MSResamplerCausalLMOutputWithPast(loss=total / (num_items_in_batch or (targets != IGNORED).sum()))

    model.forward = MethodType(forward, model)


def liger_loss() -> FusedLoss:
    """Liger's kernel. Raises ValueError without a GPU, unless Triton's interpreter is switched on."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "Liger's fused loss needs a GPU, and there is none here: leave --liger out, or set TRITON_INTERPRET=1 to "
            "have it interpreted, very slowly."
        )
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def loss(weight: Tensor, hidden: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        # The head's gradient is accumulated in float32; bfloat16 would lose precision.
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap, accum_dtype=torch.float32)
        return fused(weight, hidden, targets)

    return loss
