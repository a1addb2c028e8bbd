"""Low-rank adapters in the language model (LoRA, QLoRA), through peft."""

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .recipes import Adapters, LearningRates

# What precedes the name of a matrix in a decoder layer. Mamba's kernels read weights themselves, past adapters.
LAYER = r"model\.language_model\.(?:\w+\.)*\d+\.(?!mamba\.)(?:\w+\.)*"


def matrices(model: Any) -> dict[str, type]:
    """Names of the matrices in the language model's layers, such as q_proj, and the classes of their modules."""
    found = ((re.fullmatch(rf"{LAYER}(\w+)", name), module) for name, module in model.named_modules())
    return {match[1]: type(module) for match, module in found if match and isinstance(module, nn.Linear | Conv1D)}


def add_adapters(model: Any, adapters: Adapters, rates: LearningRates) -> Any:
    """A peft model around `model`: adapters are trained, and so are tower and projector if they have a learning rate.

    Parts that are trained in full are saved and loaded with the adapters. Raises ValueError if the language model has
    no matrices of the names in `targets`.
    """
    from peft import LoraConfig, get_peft_model

    known = matrices(model)
    if unknown := [name for name in adapters.targets if name not in known]:
        kind = model.config.text_config.model_type
        raise ValueError(f"`{kind}` has no matrix {unknown[0]} in its layers: the LoRA targets are {', '.join(known)}.")
    targets = adapters.targets or tuple(known)
    whole = {"vision_tower": rates.tower, "projector": rates.projector}
    if model.config.projector_config.fusion_layers:
        whole["fusion"] = rates.projector
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        target_modules=rf"{LAYER}({'|'.join(targets)})",
        fan_in_fan_out=any(known[name] is Conv1D for name in targets),  # GPT-2's are transposed
        modules_to_save=[name for name, rate in whole.items() if rate is not None] or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


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
