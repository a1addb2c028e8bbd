"""Records of conversations and processors for language models' tokenizers, for the tests of training data."""

import re

from components import TOKENIZERS
from tiny_models import picture, tiny_processor

from ms_resampler import MSResamplerProcessor
from ms_resampler.chat_format import image_aware, packaged_template

VICUNA = packaged_template("vicuna")
UNMARKED_VICUNA = re.sub(r"\{%-? (end)?generation -?%\}", "", VICUNA)

# As Qwen3's: an empty block before the last answer, none in the prompt, and thoughts of earlier turns dropped.
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- parts[-1].lstrip('\n') }}{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)

HARD = "Zwei Katzen 🐈🐈, 猫  auf\n\nder Matte\tnaïve </answer>"
RECORD = {
    "id": "dialogue",
    "image": [picture(0), picture(1), picture(2)],
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhich is older? 🐈"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "And <image>\nthis?"},
        {"from": "gpt", "value": HARD},
        {"from": "human", "value": "The first."},
        {"from": "gpt", "value": "The first."},
    ],
}


def processor_of(name: str, template: str) -> MSResamplerProcessor:
    tokenizer = TOKENIZERS[name]()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = image_aware(template, "<image>", tokenizer)
    small = tiny_processor()
    return MSResamplerProcessor(small.image_processor, tokenizer, patch_size=4, visual_tokens=4, chat_template=template)


def turns(*said):
    """LLaVA's turns of (who, what) pairs."""
    return [{"from": who, "value": value} for who, value in said]
