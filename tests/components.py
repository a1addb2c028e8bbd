"""Small towers, language models and tokenizers of the kinds that people bring, saved as folders.

The tokenizers are trained on a few lines here, so that they merge letters as real ones do.
"""

import json
from pathlib import Path

import tiny_models as tiny
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
)

TEXTS = [
    "What is in the picture? A red house stands behind the trees, and the cat sleeps in front of the red house.",
    "user assistant system USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant.",
    "Which is older? The first. Why? Its dust. Describe the picture in a few words. Two cats on a mat.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
] * 20

# Templates of the shapes that language models bring: for texts only, and without marks of the answers.
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)


# As Qwen3's: an empty block before the last answer, none in the prompt, thoughts of earlier turns dropped.
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- parts[-1].lstrip('\n') }}{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)

WORDS = Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")


def byte_level_tokenizer(special: list[str], eos: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's and Llama 3's; with a `bos`, that is put in front of every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML's special tokens, and no token in front of a text."""
    tokenizer = byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML
    return tokenizer


def llama_3_tokenizer() -> PreTrainedTokenizerFast:
    """A start of text that both the tokenizer and the template write, and no token for padding."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level_tokenizer(special, eos="<|end_of_text|>", bos="<|begin_of_text|>")
    tokenizer.chat_template = LLAMA_3
    return tokenizer


def llama_2_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's ways: spaces as "▁", one in front of a text, unknown characters as bytes; no chat template."""
    pieces = [text.replace(" ", "▁") for text in TEXTS]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=250, show_progress=False, initial_alphabet=sorted(set("".join(pieces))))
    )
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"qwen2": qwen_tokenizer, "llama_3": llama_3_tokenizer, "llama_2": llama_2_tokenizer}


def save_llm(folder: Path, tokenizer: str = "qwen2", kind: str = "qwen2", **changes) -> Path:
    """A language model of 32 random features in bfloat16, with just the rows that its tokenizer needs."""
    made = TOKENIZERS[tokenizer]()
    config = tiny.text_config(kind, **{"vocab_size": len(made), "eos_token_id": made.eos_token_id} | changes)
    tiny.loud(AutoModelForCausalLM.from_config(config)).to(torch.bfloat16).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


_SIDE = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}


def save_tower(folder: Path, kind: str = "clip") -> Path:
    """A whole CLIP or SigLIP, text half included, or another tower on its own; with its image processor."""
    towers = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
    if kind in towers:
        half = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = half | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(kind, vision_config=tiny.TOWERS[towers[kind]], text_config=text)
    else:
        config = tiny.tower_config(kind)
    tiny.loud(AutoModel.from_config(config)).save_pretrained(folder)
    image_processor = {
        "siglip": lambda: SiglipImageProcessorPil(size=_SIDE),
        "siglip2": lambda: Siglip2ImageProcessorPil(patch_size=tiny.PATCH_SIZE, max_num_patches=36),
    }.get(kind, lambda: CLIPImageProcessorPil(size={"shortest_edge": tiny.IMAGE_SIZE}, crop_size=_SIDE))
    image_processor().save_pretrained(folder)
    return folder
