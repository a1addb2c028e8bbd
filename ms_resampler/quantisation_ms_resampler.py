"""Loading in 4 or 8 bits: which modules a quantiser leaves alone, for every quantiser of transformers.

The language model's matrices are quantised. The vision tower, the projector and the head stay whole: they are small,
quantisers damage their odd layers (12 outputs, convolutions), and the language model would read the errors as content.
"""

import copy
import warnings
from typing import Any

from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

_WHOLE = ("vision_tower", "projector", "lm_head")

# What the configurations of quantisers call their list of modules to leave alone.
_SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def _anywhere(names: list[str]) -> list[str]:
    """Names as quantisers match them, from the start of a path, and as patterns that match inside of one."""
    return [*names, *(rf".*\.{name}" for name in names)]


def quantise_language_model_only(config: Any) -> tuple[Any, list[str]]:
    """A quantiser's configuration (or its fields) that leaves the rest whole, and the names that it skipped before."""
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.copy(config)
    field = next(name for name in _SKIP_FIELDS if hasattr(config, name))
    skipped = list(getattr(config, field) or [])
    setattr(config, field, _anywhere([*skipped, *_WHOLE]))
    return config, skipped


def finish_quantised(model: nn.Module, skipped: list[str]) -> None:
    """Warns of names that no module has, and mends 4-bit layers of bitsandbytes on a CPU."""
    for name in skipped:
        if all(should_convert_module(path, _anywhere([name])) for path, _ in model.named_modules()):
            warnings.warn(f"`quantization_config` skips `{name}`, and the model has no such module.", stacklevel=3)
    module: Any
    for module in model.modules():
        # Its layout for processors with AVX512 reads narrow matrices wrongly, and is saved wrongly.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


__all__ = ["finish_quantised", "quantise_language_model_only"]
