"""Labels, token by token, for the chat formats and tokenizers that language models bring."""

import re

import numpy as np
import pytest
import torch
from components import CHATML, LLAMA_2, LLAMA_3, TOKENIZERS
from jinja2 import Environment
from labelled_records import HARD, RECORD, UNMARKED_VICUNA, VICUNA, processor_of
from tiny_models import picture, tiny_processor

from ms_resampler.chat_format import ChatFormat, image_aware, packaged_template
from ms_resampler.training.collate import IGNORED, ConversationCollator, learned_tokens
from ms_resampler.training.conversations import BadRecord, messages_of

GREETING = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


ASKED = ["<image>\n<image>\nWhich is older? 🐈", "And <image>\nthis?", "The first."]
SAID = ["The first.", HARD, "The first."]


def layout(form: str, start: str = "") -> list[tuple[str, bool]]:
    """RECORD in a form such as "user {} bot |{}</s>|": what stands between the bars is learned."""
    text = start + "".join(form.replace("{asked}", q).replace("{said}", a) for q, a in zip(ASKED, SAID, strict=True))
    return [(part, number % 2 == 1) for number, part in enumerate(text.split("¦"))]


IM = "<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n¦{said}<|im_end|>¦\n"
HEADERS = (
    "<|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n¦{said}<|eot_id|>¦"
)
FORMATS = {
    "ChatML, own template": ("qwen2", CHATML, layout(IM)),
    "ChatML, marked": ("qwen2", packaged_template("chatml"), layout(IM)),
    "Llama 3": ("llama_3", LLAMA_3, layout(HEADERS, "<|begin_of_text|>")),
    "Vicuna, marked": ("llama_2", VICUNA, layout("USER: {asked} ASSISTANT:¦ {said}</s>¦", "<s>" + GREETING)),
    "Vicuna, unmarked": (
        "llama_2",
        UNMARKED_VICUNA,
        layout("USER: {asked} ASSISTANT: ¦{said}</s>¦", "<s>" + GREETING),
    ),
    "Llama 2": ("llama_2", LLAMA_2, layout("<s>[INST] {asked} [/INST] ¦{said} </s>¦")),
}


@pytest.fixture(params=FORMATS)
def case(request):
    name, template, parts = FORMATS[request.param]
    return processor_of(name, template), parts


def bytes_of_tokens(tokenizer, ids: list[int]) -> list[bytes]:
    """The bytes that each token stands for, read off the vocabulary; without the space put in front of a text."""
    byte_of = {char: byte for byte, char in byte_alphabet().items()}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    sentencepiece = "<0x0A>" in tokenizer.get_vocab()
    found, begins = [], True  # a text begins, or goes on after an added token
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in added:
            found.append(token.encode())
        elif not sentencepiece:
            found.append(bytes(byte_of[char] for char in token))
        elif re.fullmatch("<0x..>", token):
            found.append(bytes([int(token[3:5], 16)]))
        else:
            found.append((token[1:] if begins and token[0] == "▁" else token).replace("▁", " ").encode())
        begins = token in added
    return found


def byte_alphabet() -> dict[int, str]:
    """The character that byte-level BPE writes for a byte: itself if it is printable, else one beyond 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


def expected(tokenizer, ids: list[int], parts: list[tuple[str, bool]]) -> list[bool]:
    """Which tokens are learned, by walking through the bytes of the parts."""
    wanted = np.concatenate([np.full(len(text.encode()), learned) for text, learned in parts])
    whole = "".join(text for text, _ in parts).encode()
    place, learned = 0, []
    for piece in bytes_of_tokens(tokenizer, ids):
        assert whole[place : place + len(piece)] == piece
        learned.append(bool(wanted[place : place + max(len(piece), 1)].any()))
        place += len(piece)
    assert place == len(whole)
    return learned


def multiplied(parts, count: int = 4):
    return [(text.replace("<image>", "<image>" * count), learned) for text, learned in parts]


def test_labels_token_by_token(case):
    processor, parts = case
    batch = ConversationCollator(processor, max_length=2000)([RECORD])
    ids = batch["input_ids"][0]
    learned = torch.tensor(expected(processor.tokenizer, ids.tolist(), multiplied(parts)))
    assert 3 < learned.sum() < len(ids) / 2
    assert torch.equal(batch["labels"][0], ids.masked_fill(~learned, IGNORED))
    assert len(batch["pixel_values"]) == 3


def test_tokens_are_those_that_generate_sees(case):
    processor, _ = case
    batch = ConversationCollator(processor, max_length=2000)([RECORD])
    seen = processor.apply_chat_template(
        messages_of(RECORD), tokenize=True, return_dict=True, processor_kwargs={"images": RECORD["image"]}
    )
    assert batch["input_ids"].tolist() == seen["input_ids"]
    assert torch.equal(batch["pixel_values"], torch.tensor(np.array(seen["pixel_values"])))


def test_a_prompt_to_answer_ends_where_learning_begins(case):
    processor, _ = case
    asked = RECORD | {"image": RECORD["image"][:2], "conversations": RECORD["conversations"][:1]}
    answered = asked | {"conversations": RECORD["conversations"][:2]}
    batch = ConversationCollator(processor, max_length=2000)([answered])
    first = int((batch["labels"][0] != IGNORED).nonzero()[0])
    prompt = processor.apply_chat_template(
        messages_of(asked),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": asked["image"]},
    )["input_ids"][0]
    assert prompt == batch["input_ids"][0, :first].tolist()


def test_rows_of_a_batch_are_those_of_single_records(case):
    processor, _ = case
    short = {"id": "text", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Its dust."}]}
    collator = ConversationCollator(processor, max_length=2000)
    assert "pixel_values" not in collator([short])
    batch = collator([short, RECORD])
    for row, record in enumerate((short, RECORD)):
        alone = collator([record])
        length = alone["input_ids"].shape[1]
        for name, fill in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", IGNORED)):
            assert torch.equal(batch[name][row, :length], alone[name][0])
            assert (batch[name][row, length:] == fill).all()


THINKING = (  # empties earlier thoughts, and strips what is said, as Qwen3's template does
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>')[-1].strip('\n') %}"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ said }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)
NO_ENDS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
NEXT_ROLE_ENDS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "answers", "learned"),
    [
        (THINKING, ["one", "\ntwo\n"], ["one<|im_end|>", "two<|im_end|>"]),
        (THINKING, ["a</think>\none", "two"], ["one<|im_end|>", "two<|im_end|>"]),
        (NO_ENDS, ["one", "two"], ["one", "two"]),
        (NEXT_ROLE_ENDS, ["one", "two"], ["one<|im_start|>", "two"]),
        (LLAMA_3, [" one ", "two\n"], ["one<|eot_id|>", "two<|eot_id|>"]),
    ],
)
def test_answers_are_found_in_whatever_a_template_makes_of_them(template, answers, learned):
    tokenizer = TOKENIZERS["llama_3" if template is LLAMA_3 else "qwen2"]()
    talk = [(role, said) for answer in answers for role, said in (("user", "one<|im_end|>two"), ("assistant", answer))]
    in_parts = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in talk]
    chat_format = ChatFormat(image_aware(template, "<image>", tokenizer), tokenizer)
    text, spans = chat_format.render_with_answers(in_parts)
    talk = [{"role": role, "content": said} for role, said in talk]
    assert text == Environment().from_string(template).render(messages=talk, bos_token=tokenizer.bos_token)
    assert [text[start:end] for start, end in spans] == learned


def test_an_answer_that_the_template_drops_is_an_error():
    forgetful = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    processor = tiny_processor(chat_template=forgetful.replace("m['content']", "m['content'][0]['text']"))
    record = {"id": "x1", "conversations": RECORD["conversations"][:2], "image": RECORD["image"][:2]}
    with pytest.raises(BadRecord, match="Record x1 does not fit the chat template"):
        ConversationCollator(processor, max_length=500)([record])


@pytest.mark.parametrize(
    ("offsets", "spans", "learned"),
    [
        ([(0, 0), (0, 3), (3, 5), (5, 9)], [(3, 5)], [0, 0, 1, 0]),
        ([(0, 4), (4, 6)], [(3, 5)], [1, 1]),  # tokens that reach into a span, from either side
        ([(0, 2), (2, 3), (2, 3), (2, 3), (3, 4)], [(2, 3)], [0, 1, 1, 1, 0]),  # one character in three tokens
        ([(0, 2), (2, 2), (2, 4), (4, 4), (4, 5), (0, 0)], [(2, 4)], [0, 1, 1, 0, 0, 0]),  # tokens of no character
        ([(0, 1), (1, 2), (2, 3)], [(0, 1), (2, 3)], [1, 0, 1]),
        ([(0, 1)], [], [0]),
        ([], [], []),
    ],
)
def test_tokens_of_spans(offsets, spans, learned):
    assert learned_tokens(offsets, spans).tolist() == [bool(one) for one in learned]


@pytest.mark.parametrize("lacking", ["pad_token", "chat_template"])
def test_a_processor_that_cannot_make_batches_is_refused(lacking):
    processor = tiny_processor()
    setattr(processor if lacking == "chat_template" else processor.tokenizer, lacking, None)
    with pytest.raises(ValueError, match=f"set its `{lacking}`"):
        ConversationCollator(processor, max_length=500)


# --- Length


def test_a_cut_keeps_images_whole():
    processor = processor_of(*FORMATS["Llama 3"][:2])
    whole = ConversationCollator(processor, max_length=2000)([RECORD])
    ids = whole["input_ids"][0]
    last_image = int((ids == processor.image_token_id).nonzero()[-1])
    for length in range(last_image + 1, len(ids) + 1, 7):
        cut = ConversationCollator(processor, max_length=length, truncate=True)([RECORD])
        for name in ("input_ids", "labels"):
            assert torch.equal(cut[name], whole[name][:, :length])
        assert len(cut["pixel_values"]) == 3
    for length in range(1, last_image + 1):
        with pytest.raises(BadRecord, match="images beyond token"):
            ConversationCollator(processor, max_length=length, truncate=True)([RECORD])


def test_a_cut_that_leaves_nothing_to_learn_is_named():
    record = RECORD | {
        "image": None,
        "conversations": [{"from": "human", "value": "Why? " * 50}, {"from": "gpt", "value": "."}],
    }
    with pytest.raises(BadRecord, match="Record dialogue has no answer to learn from"):
        ConversationCollator(tiny_processor(), max_length=40, truncate=True)([record])


# --- The plain form of the first stage


@pytest.mark.parametrize("name", TOKENIZERS)
def test_plain_is_image_and_caption(name):
    processor = processor_of(name, packaged_template("chatml") if name == "qwen2" else VICUNA)
    record = {
        "id": 7,
        "image": picture(),
        "conversations": [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": f" {HARD} "}],
    }
    batch = ConversationCollator(processor, max_length=500, plain=True)([record])
    start = processor.tokenizer.bos_token or ""
    parts = [(start + "<image>" * 4, False), (HARD + "\n", True)]
    ids = batch["input_ids"][0]
    learned = torch.tensor(expected(processor.tokenizer, ids.tolist(), parts))
    assert torch.equal(batch["labels"][0], ids.masked_fill(~learned, IGNORED))


@pytest.mark.parametrize(
    "record", [RECORD, RECORD | {"image": None, "conversations": [{"from": "gpt", "value": "Hi."}]}]
)
def test_plain_needs_images_and_one_caption(record):
    with pytest.raises(BadRecord, match="needs images and one caption to be plain"):
        ConversationCollator(tiny_processor(), max_length=500, plain=True)([record])
