"""Linear layers for answering on a CPU: every weight is packed for the processor once, not at each product.

A product of few rows, such as a resampler's visual tokens or the next token of an answer, takes so little time that
packing the weight dominates. oneDNN, which is part of torch, also accepts weights that are packed already. Results
differ only by rounding, because sums are taken in another order.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

_BACK = "load the model again (from_pretrained) to have plain ones"


class PackedLinear(nn.Module):
    """A linear layer without gradients, on a CPU: inputs (..., in), weight (out, in), packed or a plain parameter.

    State dicts and pickles contain plain weights, copies packed ones. Raises ValueError if gradients are required,
    or if the layer is moved or converted.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def __getstate__(self) -> dict:
        if not self.weight.is_mkldnn:
            return vars(self)
        plain = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        return vars(self) | {"_parameters": self._parameters | {"weight": plain}, "pack": True}

    def __setstate__(self, state: dict) -> None:
        pack = state.pop("pack", False)
        super().__setstate__(state)
        if pack:
            self.weight = nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(self.weight), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # takes no packed weights; this falls back to Python
            raise ValueError(f"Packed weights cannot be compiled: {_BACK}.")
        if torch.is_grad_enabled() and inputs.requires_grad:
            raise ValueError(f"Packed weights cannot be trained: call under torch.no_grad(), or {_BACK}.")
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Called by .to() and .float() for every tensor: refuses to move or convert packed weights."""
        before = torch.empty(0, dtype=self.weight.dtype, device="cpu")
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ValueError(f"Packed weights stay on the CPU and {before.dtype}: {_BACK}.")
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self.weight.to_dense()


@torch.no_grad()
def pack_linears(model: nn.Module) -> None:
    """Packs the weights of a model's linear layers, in place, and keeps no plain copy of them.

    Layers on another device, in a dtype that oneDNN does not support on this processor, or with hooks or other
    parameters are left unchanged. So are weights shared with an embedding, which needs the plain layout; for the
    head's single row, oneDNN is fastest with it anyway.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parent in model.modules():
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and _can_be_packed(layer):
                shared = id(layer.weight) in embeddings
                weight = layer.weight if shared else torch.ops.mkldnn._reorder_linear_weight(layer.weight)
                setattr(parent, name, PackedLinear(weight, layer.bias))


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    if type(weight) is not nn.Parameter or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
