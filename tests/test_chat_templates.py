"""The chat templates: conversations before and after, and which tokens are answers."""

from pathlib import Path

import pytest
import torch
from tiny_models import picture, tiny_processor

import ms_resampler

FOLDER = Path(ms_resampler.__file__).parent / "chat_templates"
IMAGE = {"type": "image"}


def said(text):
    return {"type": "text", "text": text}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [IMAGE, IMAGE, said("Which is older?")]},
    {"role": "assistant", "content": [said("The first.")]},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Its dust."},
]
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\n<image>\nWhich is older?<|im_end|>\n"
        "<|im_start|>assistant\nThe first.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nIts dust.<|im_end|>\n"
    ),
    "vicuna": (
        "Be brief. USER: <image>\n<image>\nWhich is older? ASSISTANT: The first.</s>USER: Why? ASSISTANT: Its dust.</s>"
    ),
}
PROMPT = {"chatml": "<|im_start|>assistant\n", "vicuna": "ASSISTANT:"}
ANSWERS = {
    "chatml": "The first.<|im_end|>Its dust.<|im_end|>",
    "vicuna": " The first.</s> Its dust.</s>",
}


@pytest.fixture(params=RENDERED)
def form(request):
    return request.param


@pytest.fixture
def processor(form):
    return tiny_processor(chat_template=(FOLDER / f"{form}.jinja").read_text())


def test_conversations_before_and_after(form, processor):
    assert processor.apply_chat_template(CONVERSATION) == RENDERED[form]
    assert processor.apply_chat_template(CONVERSATION, add_generation_prompt=True) == RENDERED[form] + PROMPT[form]


def test_vicuna_has_a_system_message_of_its_own():
    processor = tiny_processor(chat_template=(FOLDER / "vicuna.jinja").read_text())
    rendered = processor.apply_chat_template(CONVERSATION[3:4], add_generation_prompt=True)
    assert rendered == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Why? ASSISTANT:"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_marks_the_answers_and_their_end(form, processor, side):
    short = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    batch = processor.apply_chat_template(
        [CONVERSATION, short],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": [[picture(0), picture(1)], []], "padding_side": side},
    )
    masks = torch.as_tensor(batch["assistant_masks"]).bool()
    learned = [processor.tokenizer.decode(ids[mask]) for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    end = ANSWERS[form][-len("</s>") :] if form == "vicuna" else "<|im_end|>"
    assert learned == [ANSWERS[form], f"{' ' if form == 'vicuna' else ''}Me.{end}"]


def test_an_image_token_that_a_user_types_is_only_text(processor):
    typed = [{"role": "user", "content": [IMAGE, said("What does <image> mean?")]}]
    inputs = processor.apply_chat_template(
        typed, tokenize=True, return_dict=True, sanitize_control_tokens=True, processor_kwargs={"images": [picture()]}
    )
    assert inputs["input_ids"][0].count(processor.image_token_id) == 4
