"""The chat templates: conversations before and after, and which tokens are answers."""

from pathlib import Path

import pytest
from jinja2 import TemplateError
from tiny_models import IMAGE, picture, tiny_processor
from transformers import AutoProcessor

import ms_resampler

FOLDER = Path(ms_resampler.__file__).parent / "chat_templates"
PICTURE = {"type": "image"}


def says(role: str, *parts: str | dict) -> dict:
    """A message; text alone stays a plain string."""
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": role, "content": parts[0]}
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


QUESTION = [says("user", PICTURE, "What is it?")]
DIALOGUE = [
    says("system", "Be brief."),
    says("user", PICTURE, PICTURE, "Which is older?"),
    says("assistant", "The ", "first."),
    says("user", "And ", PICTURE, "this?"),
    says("assistant", "  Older still.\n"),
    says("user", "Why?"),
    says("assistant", "Its dust."),
]
SMALL_TALK = [says("user", "Who?"), says("assistant", "Me.")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
HONEYBEE = (
    "The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# What is said, what is learned from it, and what asks for the next answer.
FORMS = {
    "chatml": {
        "question": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n",
        "dialogue": (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\n<image>\n<image>\nWhich is older?<|im_end|>\n"
            "<|im_start|>assistant\nThe first.<|im_end|>\n"
            "<|im_start|>user\nAnd <image>\nthis?<|im_end|>\n"
            "<|im_start|>assistant\n  Older still.\n<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\nIts dust.<|im_end|>\n"
        ),
        "small talk": "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n",
        "answers": ["The first.<|im_end|>", "  Older still.\n<|im_end|>", "Its dust.<|im_end|>"],
        "small answers": ["Me.<|im_end|>"],
        "prompt": "<|im_start|>assistant\n",
    },
    "vicuna": {
        "question": VICUNA + "USER: <image>\nWhat is it? ",
        "dialogue": (
            "Be brief. USER: <image>\n<image>\nWhich is older? ASSISTANT: The first.</s>"
            "USER: And <image>\nthis? ASSISTANT:   Older still.\n</s>"
            "USER: Why? ASSISTANT: Its dust.</s>"
        ),
        "small talk": VICUNA + "USER: Who? ASSISTANT: Me.</s>",
        "answers": [" The first.</s>", "   Older still.\n</s>", " Its dust.</s>"],
        "small answers": [" Me.</s>"],
        "prompt": "ASSISTANT:",
    },
    "honeybee": {
        "question": HONEYBEE + "\nHuman: <image>\nHuman: What is it?",
        "dialogue": (
            "Be brief.\nHuman: <image>\nHuman: <image>\nHuman: Which is older?\nAI: The first.</s>"
            "\nHuman: <image>\nHuman: And this?\nAI:   Older still.\n</s>"
            "\nHuman: Why?\nAI: Its dust.</s>"
        ),
        "small talk": HONEYBEE + "\nHuman: Who?\nAI: Me.</s>",
        "answers": ["The first.</s>", "  Older still.\n</s>", "Its dust.</s>"],
        "small answers": ["Me.</s>"],
        "prompt": "\nAI: ",
    },
}


@pytest.fixture(params=FORMS)
def form(request) -> dict:
    return FORMS[request.param] | {"template": (FOLDER / f"{request.param}.jinja").read_text()}


@pytest.fixture
def processor(form):
    return tiny_processor(chat_template=form["template"])


def test_conversations_before_and_after(form, processor):
    for name, conversation in (("question", QUESTION), ("dialogue", DIALOGUE), ("small talk", SMALL_TALK)):
        assert processor.apply_chat_template(conversation) == form[name]
        assert processor.apply_chat_template(conversation, add_generation_prompt=True) == form[name] + form["prompt"]
    assert processor.apply_chat_template([DIALOGUE, SMALL_TALK]) == [form["dialogue"], form["small talk"]]
    listed = [says("system", "Be ", "brief."), *DIALOGUE[1:]]
    assert processor.apply_chat_template(listed) == form["dialogue"]


def test_an_answer_can_be_continued(form, processor):
    begun = processor.apply_chat_template([*DIALOGUE[:-1], says("assistant", "Its")], continue_final_message=True)
    assert begun == form["dialogue"][: form["dialogue"].rindex("Its") + 3]


@pytest.mark.parametrize("name", ["vicuna", "honeybee"])
def test_these_know_no_other_roles(name):
    processor = tiny_processor(chat_template=(FOLDER / f"{name}.jinja").read_text())
    for role in ("tool", "system"):
        with pytest.raises(TemplateError, match="every message after the first is of a user or an assistant"):
            processor.apply_chat_template([*QUESTION, says(role, "42")])


def test_tokens_are_those_of_the_text_with_its_images(form, processor):
    inputs = processor.apply_chat_template(
        DIALOGUE,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": [picture(n) for n in range(3)], "visual_tokens": [1, (1, 2), 4]},
    )
    text = form["dialogue"] + form["prompt"]
    for count in (1, 2, 4):
        text = text.replace("<image>", "<IMAGE>" * count, 1)
    assert inputs["input_ids"] == [processor.tokenizer(text.replace("<IMAGE>", "<image>"))["input_ids"]]


def spans(ids: list[int], parts: list[list[int]]) -> list[int]:
    """A mask that is 1 where the parts occur, one after the other."""
    mask, start = [0] * len(ids), 0
    for part in parts:
        start = next(n for n in range(start, len(ids)) if ids[n : n + len(part)] == part)
        mask[start : start + len(part)] = [1] * len(part)
        start += len(part)
    return mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_marks_the_answers_and_their_end(form, processor, side):
    batch = processor.apply_chat_template(
        [DIALOGUE, SMALL_TALK],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": [[picture(n) for n in range(3)], []], "padding_side": side},
    )
    for ids, mask, answers in zip(
        batch["input_ids"].tolist(),
        batch["assistant_masks"].tolist(),
        (form["answers"], form["small answers"]),
        strict=True,
    ):
        assert mask == spans(ids, [processor.tokenizer(answer)["input_ids"] for answer in answers])
    assert not (batch["assistant_masks"].bool() & (batch["input_ids"] == IMAGE)).any()
    assert not (batch["assistant_masks"].bool() & (batch["attention_mask"] == 0)).any()
    rows = batch["attention_mask"].tolist()
    assert rows == [sorted(row, reverse=side == "right") for row in rows]
    assert sum(map(sum, rows)) < batch["attention_mask"].numel()  # one of the two is padded


def test_control_tokens_that_a_user_types_are_only_text(processor):
    typed = "What do <image> and <|im_end|> mean?"

    def ids_of(text: str, **options) -> list[int]:
        return processor.apply_chat_template(
            [says("user", PICTURE, text)],
            tokenize=True,
            return_dict=True,
            processor_kwargs={"images": [picture()]},
            **options,
        )["input_ids"][0]

    with pytest.raises(ValueError, match="Prompt 1 has 2 <image> placeholders, but 1 images"):
        ids_of(typed)
    ids, plain = ids_of(typed, sanitize_control_tokens=True), ids_of("Hi")
    assert typed in processor.decode(ids)
    for token in (IMAGE, processor.tokenizer.eos_token_id):
        assert ids.count(token) == plain.count(token)


def test_the_template_is_saved_in_a_file_of_its_own(form, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == form["template"]
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template(DIALOGUE) == form["dialogue"]
