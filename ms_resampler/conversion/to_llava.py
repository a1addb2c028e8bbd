"""Converts ours, with LLaVA's MLP, to transformers' LLaVA layout."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaProcessor

from ..configuration_ms_resampler import MSResamplerConfig
from ..modeling_ms_resampler import build_head
from ..processing_ms_resampler import MSResamplerProcessor
from .mapping import Plan, Row
from .tables import TO_LLAVA, translate
from .weights import Output, list_weights


def plan_llava(folder: Path) -> Plan:
    """The plan for a LlavaForConditionalGeneration that computes the same function.

    Raises ValueError if its architecture cannot hold the model.
    """
    config: Any = MSResamplerConfig.from_pretrained(folder)
    check_fits(config)
    rows, outputs = [], []
    for weight in list_weights(folder):
        name = translate(weight.key, TO_LLAVA)
        assert name is not None
        rows.append(Row(weight.key, name, weight.shape, "as it is"))
        outputs.append(Output(name, weight.shape, weight.dtype, weight.read))
    return Plan("our", rows, outputs, partial(write_settings, folder, config))


def write_settings(source: Path, config: Any, folder: Path) -> None:
    """Writes LLaVA's configuration and processor, and the source's settings for generation."""
    llava = LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_id=config.image_token_id,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy="default",
        image_seq_length=config.native_patch_grid[0] * config.native_patch_grid[1],
        tie_word_embeddings=config.text_config.tie_word_embeddings,
        dtype=config.dtype,
    )
    llava.architectures = ["LlavaForConditionalGeneration"]
    llava.save_pretrained(folder)
    llava_processor(MSResamplerProcessor.from_pretrained(source), config).save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")


def llava_processor(ours: MSResamplerProcessor, config: Any) -> LlavaProcessor:
    """transformers' processor around the same tokenizer and image processor."""
    return LlavaProcessor(
        ours.image_processor,
        ours.tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=ours.chat_template,
        image_token=ours.image_token,
        num_additional_image_tokens=config.num_prefix_tokens,
    )


def check_fits(config: Any) -> None:
    """Raises ValueError if transformers' LLaVA has no such model."""
    kind = config.projector_config.projector_type
    if kind != "mlp":
        raise ValueError(f"transformers' LLaVA has an MLP for every patch, not `{kind}`: it cannot hold this model.")
    if config.visual_words:
        raise ValueError("transformers' LLaVA has no visual tokens that are words: it cannot hold this model.")
    if config.num_prefix_tokens != 1:
        raise ValueError(
            "transformers' LLaVA drops one token before the patches, but this tower has "
            f"{config.num_prefix_tokens}: it cannot hold this model."
        )
    with torch.device("meta"):
        plain = build_head(config.text_config).bias is None
    if not plain or config.logit_scale != 1 or config.logit_cap is not None:
        raise ValueError(
            "transformers' LLaVA makes logits by a matrix alone, and the language model "
            f"`{config.text_config.model_type}` has a bias, a scale or a cap there: it cannot hold this model."
        )
