"""Records of conversations and processors for language models' tokenizers, for the tests of training data."""

import re

from components import TOKENIZERS
from tiny_models import picture, tiny_processor

from ms_resampler import MSResamplerProcessor
from ms_resampler.chat_format import image_aware, packaged_template

VICUNA = packaged_template("vicuna")
UNMARKED_VICUNA = re.sub(r"\{%-? (end)?generation -?%\}", "", VICUNA)

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
