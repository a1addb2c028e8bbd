"""Compares source and result of a conversion on the same input."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from ..configuration_ms_resampler import MSResamplerConfig
from ..folders import PROJECTOR
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from .source import local_folder


def largest_difference(source: str | Path, result: str | Path) -> tuple[float, float]:
    """The largest difference of the logits on one picture and question, and the largest logit.

    Raises ValueError if one of the two cannot run here, or they read the question as different tokens.
    """
    logits = [logits_of(folder) for folder in map(local_folder, (source, result))]
    if logits[0].shape != logits[1].shape:
        raise ValueError(
            f"{source} and {result} read the same question as {logits[0].shape[1]} and {logits[1].shape[1]} tokens: "
            "their projectors differ, so their logits cannot be compared."
        )
    words = min(answer.shape[-1] for answer in logits)  # the result may have a row more, for LLaVA-NeXT's newline
    logits = [answer[..., :words] for answer in logits]
    return (logits[0] - logits[1]).abs().max().item(), logits[0].abs().max().item()


@torch.inference_mode()
def logits_of(folder: Path) -> Tensor:
    """Logits of a picture's question, in float32."""
    kinds: dict[str, Any] = {
        "llava": LlavaForConditionalGeneration,
        "llava_next": LlavaNextForConditionalGeneration,
        MSResamplerConfig.model_type: MSResamplerForConditionalGeneration,
    }
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind not in kinds:
        raise ValueError(f"{folder} has a layout that does not run here (`{kind}`): there is nothing to compare with.")
    if (folder / PROJECTOR).is_file():
        raise ValueError(f"{folder} holds a projector alone, which does not run: there is nothing to compare with.")
    model = kinds[kind].from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    inputs = processor(text=f"{processor.image_token}\nWhat is this?", images=picture, return_tensors="pt")
    return model(**inputs).logits
