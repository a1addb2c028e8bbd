"""How models load: in 4 or 8 bits, with weights of earlier versions, and with the code of their own folder.

In few bits only the language model's matrices are quantised, by any quantiser of transformers. Vision tower, projector
and head keep their precision: they are small, and quantisers damage their odd layers (12 outputs, convolutions).
"""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .projectors_ms_resampler import EARLIER_NAMES

_WHOLE = ("vision_tower", "projector", "fusion", "lm_head")

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


def code_of_folder(cls: type[PreTrainedModel], folder: str | os.PathLike | None) -> type[PreTrainedModel]:
    """The class of this name in a folder's own code, or `cls` itself if there is no other.

    The Auto classes know one model class for each configuration class, which two folders may share.
    """
    is_remote = cls.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
    if not (is_remote and folder and (Path(folder) / "modeling_ms_resampler.py").is_file()):
        return cls
    return get_class_from_dynamic_module(f"modeling_ms_resampler.{cls.__name__}", folder)


class LoadingMixin:
    """`from_pretrained` of all MS-Resampler models."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        quantization_config: Any = None,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a model; projector weights may have the names of earlier versions, and are saved with today's.

        `quantization_config` applies to the language model only; the rest is then in bfloat16, unless `dtype` is given.
        Further modules to skip may be named by any part of their path.
        """
        path: Any = pretrained_model_name_or_path
        base: Any = super()
        if kwargs.get("trust_remote_code") and (own := code_of_folder(cls, path)) is not cls:
            options = {"quantization_config": quantization_config, "key_mapping": key_mapping}
            return own.from_pretrained(path, *args, **options, **kwargs)
        skipped: list[str] = []
        if quantization_config is not None:
            quantization_config, skipped = quantise_language_model_only(quantization_config)
            if "torch_dtype" not in kwargs:
                kwargs.setdefault("dtype", torch.bfloat16)
        earlier = {rf"\b{old}$": new for old, new in EARLIER_NAMES.items()}
        options = {"quantization_config": quantization_config, "key_mapping": earlier | (key_mapping or {})}
        loaded = base.from_pretrained(path, *args, **options, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # transformers would undo the renamings when it saves.
        model._weight_conversions = [
            conversion for conversion in model._weight_conversions or [] if conversion.source_patterns[0] not in earlier
        ]
        finish_quantised(model, skipped)
        return loaded


__all__ = ["LoadingMixin"]
