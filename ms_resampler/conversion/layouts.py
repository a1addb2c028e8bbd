"""Recognises the layout of a checkpoint."""

from pathlib import Path
from typing import Any

from ..folders import read_config
from .from_honeybee import open_honeybee
from .from_llava import CONFIGS, open_llava
from .from_original import ORIGINAL_MODELS, open_original
from .from_ours import open_ours
from .source import Source
from .weights import list_weights


def open_source(folder: Path, projector: dict[str, Any], tower: str | None, llm: str | None) -> Source:
    """Recognises a checkpoint's layout and reads everything but the weights.

    Raises ValueError, with what was found, if the layout is unknown.
    """
    config = read_config(folder)
    kind = config.get("model_type")
    if kind == "ms_resampler":
        return open_ours(folder, projector, tower, llm)
    if kind in CONFIGS and "vision_config" in config:
        return open_llava(folder, projector)
    if kind in ORIGINAL_MODELS and "mm_vision_tower" in config:
        return open_original(folder, config, projector, tower, llm)
    if kind == "mllm" and "lm_config" in config:
        return open_honeybee(folder, config, projector, llm)
    keys = [weight.key for weight in list_weights(folder)]
    raise ValueError(
        f"{folder} has an unknown layout (known: transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision; the original "
        "LLaVA's, TokenPacker's, Delta-LLaVA's, MQT's, LLaVA-Mini's, MobileVLM's, Honeybee's; ours): its model_type is "
        f"`{kind}`, "
        f"and its {len(keys)} weights begin with "
        f"{', '.join(sorted({key.split('.')[0] for key in keys})[:6])}."
    )
