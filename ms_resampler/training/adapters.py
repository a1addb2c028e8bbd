"""Low-rank adapters in the language model (LoRA, QLoRA), through peft."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .recipes import Adapters, LearningRates

# Names of the matrices in the decoder layers of all supported families.
TARGETS = r"model\.language_model\.layers\..*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj"


def add_adapters(model: Any, adapters: Adapters, rates: LearningRates) -> Any:
    """A peft model around `model`: adapters are trained, and so are tower and projector if they have a learning rate.

    Parts that are trained in full are saved and loaded with the adapters. Raises ValueError if the language model has
    no matrix with the name of a target.
    """
    from peft import LoraConfig, get_peft_model

    whole = {"vision_tower": rates.tower, "projector": rates.projector}
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        target_modules=pattern_of(model, adapters.targets) if adapters.targets else TARGETS,
        modules_to_save=[name for name, rate in whole.items() if rate is not None] or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def pattern_of(model: Any, targets: Iterable[str]) -> str:
    """The pattern of the whole names of these matrices. Raises ValueError if the language model has none of a name."""
    modules = model.base_model.language_model.named_modules()
    known = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    if unknown := sorted(set(targets) - known):
        raise ValueError(
            f"The language model has no matrix {unknown[0]!r} for adapters; it has {', '.join(sorted(known))}."
        )
    return rf"model\.language_model\..*\.({'|'.join(targets)})"


def four_bit_config(bf16: bool) -> Any:
    """How QLoRA loads the language model: matrices in NF4, multiplied in bfloat16 or float32.

    Raises ValueError if bitsandbytes is missing, or too old for transformers.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ValueError("Four-bit weights (QLoRA) need the package bitsandbytes: pip install --upgrade bitsandbytes.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        bnb_4bit_quant_storage=torch.bfloat16,  # a dtype that FSDP can shard
    )
