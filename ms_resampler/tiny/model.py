"""The embedded model before training: tokenizer, processor and a few million random weights."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import ConvNextConfig, PreTrainedTokenizerFast, Qwen3Config, ViTImageProcessorPil

from ..chat_format import packaged_template
from ..configuration_ms_resampler import MSResamplerConfig
from ..modeling_ms_resampler import MSResamplerForConditionalGeneration
from ..processing_ms_resampler import MSResamplerProcessor
from .scenes import INDEX, TRANSCRIBE, ask, index_by_name, make_scene, scene_rng, transcript

IMAGE_PIXELS, PATCH_PIXELS, TOKEN_GRID, WIDTH = 96, 8, [6, 6], 256
VOCABULARY = 640
SCENES_FOR_TOKENIZER = 500


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts of the scenes; it can encode any other text as bytes."""
    texts = [TRANSCRIBE, INDEX, "user\n", "assistant\n", "system\n"] * SCENES_FOR_TOKENIZER
    for index in range(SCENES_FOR_TOKENIZER):
        scene = make_scene("train", index)
        texts += [transcript(scene), index_by_name(scene, scene_rng("train", index, 2))]
        texts += [text for asked in ask(scene, "train", index, 12) for text in (asked.question, asked.answer)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
    )


def tiny_config(processor: MSResamplerProcessor) -> MSResamplerConfig:
    """A ConvNeXt tower of 12 x 12 patches, three scopes, 36 visual tokens and a Qwen3 of four layers."""
    tokenizer = processor.tokenizer
    return MSResamplerConfig(
        vision_config=ConvNextConfig(
            image_size=IMAGE_PIXELS,
            patch_size=PATCH_PIXELS,
            num_stages=1,
            depths=[5],
            hidden_sizes=[192],
            layer_scale_init_value=0.5,
        ),
        text_config=Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        projector_config={
            "hidden_size": WIDTH,
            "num_attention_heads": 8,
            "intermediate_size": 2 * WIDTH,
            "visual_tokens": TOKEN_GRID,
        },
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
    )


def assemble_tiny(seed: int) -> tuple[MSResamplerForConditionalGeneration, MSResamplerProcessor]:
    """The model with random weights, and its processor."""
    torch.manual_seed(seed)
    image_processor = ViTImageProcessorPil(
        size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = MSResamplerProcessor(
        image_processor,
        train_tokenizer(),
        patch_size=PATCH_PIXELS,
        visual_tokens=TOKEN_GRID,
        chat_template=packaged_template("chatml"),
    )
    model = MSResamplerForConditionalGeneration(tiny_config(processor))
    keep_variance(model.model.vision_tower)
    keep_variance(model.model.language_model)
    return model, processor


@torch.no_grad()
def keep_variance(part: nn.Module) -> None:
    """Initialises matrices with std 1 / sqrt(inputs): at this width transformers' 0.02 is too small to train."""
    for module in part.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
