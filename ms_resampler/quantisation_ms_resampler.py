"""Loading in 4 or 8 bits: only the language model's matrices are quantised, by any quantiser of transformers.

Vision tower, projector and head keep their precision: they are small, and quantisers damage their odd layers (12
outputs, convolutions).
"""

import copy
import warnings
from typing import Any

from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module

_WHOLE = ("vision_tower", "projector", "lm_head")

# Names that quantisers' configurations have for the list of modules to skip.
_SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def _anywhere(names: list[str]) -> list[str]:
    """Names as quantisers match them: at the start of a path, and as patterns inside one."""
    return [*names, *(rf".*\.{name}" for name in names)]


def quantise_language_model_only(config: Any) -> tuple[Any, list[str]]:
    """A quantiser's configuration (or its fields) that skips the rest, and the names that it skipped before."""
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.copy(config)
    field = next(name for name in _SKIP_FIELDS if hasattr(config, name))
    skipped = list(getattr(config, field) or [])
    setattr(config, field, _anywhere([*skipped, *_WHOLE]))
    return config, skipped


def finish_quantised(model: nn.Module, skipped: list[str]) -> None:
    """Warns of names that match no module, and fixes bitsandbytes' 4-bit layers on a CPU."""
    for name in skipped:
        if all(should_convert_module(path, _anywhere([name])) for path, _ in model.named_modules()):
            warnings.warn(f"`quantization_config` skips `{name}`, but the model has no such module.", stacklevel=3)
    module: Any
    for module in model.modules():
        # Its layout for AVX512 processors misreads narrow matrices, and is saved wrongly.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


__all__ = ["finish_quantised", "quantise_language_model_only"]
