"""Small models, tokenizers, processors and pictures with random weights: what the tests are run on.

Every tower reads patches of 4 x 4 pixels and is made for images of 24 x 24; every language model is 32 wide.
"""

from dataclasses import fields

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ms_resampler import (
    MSResamplerConfig,
    MSResamplerForConditionalGeneration,
    MSResamplerModel,
    MSResamplerProcessor,
)

IMAGE_SIZE, PATCH_SIZE = 24, 4

# The argument that takes the keys and values of earlier text: transformers renamed it in 5.24.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("past_key_values", "cache"))
VOCABULARY = 320

# A template of ChatML's shape that knows images, and marks what the assistant says.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% for part in parts %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endgeneration %}{% else %}"
    "{% for part in parts %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TRANSFORMER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_SQUARE = _TRANSFORMER | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}

TOWERS: dict[str, dict] = {
    "clip_vision_model": _SQUARE,
    "siglip_vision_model": _SQUARE,
    "siglip2_vision_model": _TRANSFORMER | {"patch_size": PATCH_SIZE, "num_patches": 36},
    "dinov2": _SQUARE | {"mlp_ratio": 2, "reshape_hidden_states": False},
    "dinov2_with_registers": _SQUARE | {"mlp_ratio": 2, "num_register_tokens": 3},
    "dinov3_vit": _SQUARE | {"num_register_tokens": 2},
    "vit": _SQUARE,
    "convnext": {"patch_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 24},
}
TOWERS["convnextv2"] = TOWERS["convnext"]
for _name in ("dinov2", "dinov2_with_registers"):
    TOWERS[_name].pop("intermediate_size", None)

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS_OF_8 = _DECODER | {"head_dim": 8}

LANGUAGE_MODELS: dict[str, dict] = {
    "llama": _DECODER,
    "mistral": _HEADS_OF_8,
    "qwen2": _DECODER,
    "qwen3": _HEADS_OF_8,
    "phi3": _DECODER,
    "gemma": _HEADS_OF_8,
    "gemma2": _HEADS_OF_8 | {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "gemma3_text": _HEADS_OF_8 | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    "granite": _DECODER
    | {
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.5,
    },
    "cohere": _DECODER | {"logit_scale": 0.25},
    "hyperclovax": _DECODER | {"logits_scaling": 0.25},
    "phi": _DECODER,  # this and gptj have a head with a bias; the rest, other names for their parts
    "gptj": _DECODER | {"rotary_dim": 4},
    "gpt_neox": _DECODER,
    "gpt2": _DECODER,
    "opt": _DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "falcon_h1": _DECODER
    | {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}

_PROJECTOR = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "query_grid": [2, 2],
    "visual_tokens": 4,
}


def tower_config(kind: str = "clip_vision_model", **changes) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **TOWERS[kind] | changes)


def text_config(kind: str = "qwen3", **changes) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **LANGUAGE_MODELS[kind] | changes)


def tiny_config(
    tower: str = "clip_vision_model",
    text: str = "qwen3",
    *,
    tower_changes: dict | None = None,
    text_changes: dict | None = None,
    projector: dict | None = None,
    **changes,
) -> MSResamplerConfig:
    """A configuration of the named tower and language model; the keyword dicts change single fields."""
    if tower in ("convnext", "convnextv2"):
        changes.setdefault("vision_feature_layer", -1)
    return MSResamplerConfig(
        vision_config=tower_config(tower, **tower_changes or {}),
        text_config=text_config(text, **text_changes or {}),
        projector_config=_PROJECTOR | (projector or {}),
        image_token_id=tiny_tokenizer().get_vocab()["<image>"],
        **changes,
    )


def tiny_model(*args, **kwargs) -> MSResamplerForConditionalGeneration:
    """A model ready to answer, from the arguments of `tiny_config`; the same weights every time."""
    torch.manual_seed(0)
    return loud(MSResamplerForConditionalGeneration(tiny_config(*args, **kwargs))).eval()


def tiny_base_model(*args, **kwargs) -> MSResamplerModel:
    """The same without a head."""
    torch.manual_seed(0)
    return loud(MSResamplerModel(tiny_config(*args, **kwargs))).eval()


@torch.no_grad()
def loud(model):
    """Makes every matrix and bias large enough to matter: with an initialisation of 0.02 all answers are alike."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and "embed" not in f".{name}".rsplit(".", 2)[-2]:
            parameter.add_(noise * parameter[0].numel() ** -0.5 * 0.7)
        else:
            parameter.add_(noise * 0.1)
    return model


def tiny_tokenizer(vocabulary: int | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after the special ones: no training, no files."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<image>"],
    )


def tiny_processor(tower: str = "clip_vision_model", **changes) -> MSResamplerProcessor:
    """The processor of `tiny_config(tower)`."""
    if tower == "siglip2_vision_model":
        image_processor = Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=36)
    else:
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
    patch_size = tiny_config(tower).patch_size
    options = {"patch_size": patch_size, "visual_tokens": 4, "chat_template": CHAT_TEMPLATE} | changes
    return MSResamplerProcessor(image_processor, tiny_tokenizer(), **options)


def save_tiny(folder, *args, **kwargs) -> None:
    """A folder with the model of these arguments of `tiny_config`, and the plain processor."""
    tiny_model(*args, **kwargs).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)


def asked(processor, text: str, *pictures, **options):
    """What a model reads of a question about pictures, or files of them."""
    content = [*({"type": "image", "image": one} for one in pictures), {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options,
    )  # fmt: skip


def picture(seed: int = 0, size: tuple[int, int] = (30, 40)) -> Image.Image:
    """A picture of noise of (height, width) pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def np_pixels(image: Image.Image) -> np.ndarray:
    """A picture's values (3, height, width), 0 to 255."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)


def pixels(count: int = 1, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), seed: int = 0) -> Tensor:
    """What an image processor makes of pictures: (count, 3, height, width)."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def words(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Token ids of plain text, one list a length, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 250, (length,), generator=generator).tolist() for length in lengths]


def collate(rows: list[list[int]], side: str = "left", pad: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask of rows of ids, padded on a side."""
    length = max(map(len, rows))
    padded, mask = [], []
    for row in rows:
        fill = [pad] * (length - len(row))
        padded.append(fill + row if side == "left" else row + fill)
        mask.append([0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill))
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


IMAGE = tiny_tokenizer().get_vocab()["<image>"]
"""The id of the image token."""


def ragged_rows() -> tuple[list[list[int]], Tensor, Tensor, list[slice]]:
    """Four prompts with one, no, three and one images of different budgets, and each prompt's images."""
    grids = torch.tensor([[2, 2], [1, 2], [2, 3], [1, 1], [2, 2]])
    budget = [[IMAGE] * int(grid.prod()) for grid in grids]
    text = words(3, 12, 2, 4, 1, 5, 8)
    rows = [
        text[0] + budget[0] + text[2],
        text[1],
        budget[1] + text[4] + budget[2] + text[3] + budget[3],
        text[5] + budget[4] + text[6],
    ]
    return rows, pixels(5), grids, [slice(0, 1), slice(1, 1), slice(1, 4), slice(4, 5)]


def ragged_batch(side: str = "left") -> dict[str, Tensor]:
    """The prompts of `ragged_rows`, padded on a side."""
    rows, images, grids, _ = ragged_rows()
    return {**collate(rows, side), "pixel_values": images, "token_grids": grids}
