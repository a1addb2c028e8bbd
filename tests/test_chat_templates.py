"""The chat templates: conversations before and after, and which tokens are answers."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from components import CHATML, LLAMA_2, LLAMA_3, THINKING, TOKENIZERS, qwen_tokenizer
from jinja2 import Environment, TemplateError, nodes
from PIL import Image
from tiny_models import IMAGE, picture, tiny_processor, tiny_tokenizer
from tokenizers import processors

import ms_resampler
from ms_resampler import MSResamplerProcessor
from ms_resampler.assembly import Components, choose_template
from ms_resampler.chat_format import ChatFormat, image_aware, packaged_template, thinking_off

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
    return FORMS[request.param] | {"template": packaged_template(request.param)}


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
    processor = tiny_processor(chat_template=packaged_template(name))
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


@pytest.mark.parametrize("side", [None, "right"])
def test_the_mask_marks_the_answers_and_their_end(form, processor, side):
    batch = processor.apply_chat_template(
        [DIALOGUE, SMALL_TALK],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"images": [[picture(n) for n in range(3)], []]} | ({"padding_side": side} if side else {}),
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


# What a person types, and parts and keys of messages


@pytest.fixture(params=TOKENIZERS)
def family(request):
    """A processor of a family of tokenizers, with the template that `init` chooses."""
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    template, _ = choose_template(tokenizer, Components(vision="", llm=request.param))
    image_processor = tiny_processor().image_processor
    return MSResamplerProcessor(image_processor, tokenizer, patch_size=4, visual_tokens=4, chat_template=template)


def inputs_of(processor, conversation, **options) -> dict:
    return processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)


def test_two_steps_make_the_tokens_of_one(family):
    """Template to text, then the processor: the start of the text is there once."""
    asked = [says("user", {"type": "image", "image": picture()}, "What is it?")]
    one = inputs_of(family, asked, add_generation_prompt=True)["input_ids"]
    text = family.apply_chat_template(asked, add_generation_prompt=True)
    assert (
        family(images=picture(), text=text)["input_ids"]
        == family(images=[[picture()]], text=[text])["input_ids"]
        == one
    )
    if bos := family.tokenizer.bos_token_id:
        assert one[0].count(bos) == 1 == family(text="Who?")["input_ids"][0].count(bos)


def test_a_start_of_text_without_a_name_is_there_once():
    """ChatGLM's tokenizers write a start that no `bos_token` tells of."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    start = tokenizer.get_vocab()["<|im_start|>"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    for texts in (["a"], ["<|im_start|>a"], ["a", "<|im_start|>bc"]):
        assert [ids.count(start) for ids in processor(text=texts)["input_ids"]] == [1] * len(texts)
    assert processor(text="<|im_start|>a", add_special_tokens=True)["input_ids"][0].count(start) == 2


@pytest.mark.parametrize("two_steps", [False, True])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize(
    "parts", [["What does <image> mean?"], ["<image>", "<image><image>"], ["What is <ima", "ge> and <", "image", ">?"]]
)
def test_an_image_token_that_somebody_types_is_text(family, role, parts, two_steps):
    shown = says("user", PICTURE, "Hi")
    said = [says(role, *parts), shown] if role == "system" else [shown, says(role, *parts)]
    if two_steps:
        ids = family(images=[[picture()]], text=[family.apply_chat_template(said)])["input_ids"][0]
    else:
        ids = inputs_of(family, said, processor_kwargs={"images": [picture()]})["input_ids"][0]
    assert ids.count(family.image_token_id) == 4
    text = family.decode([token for token in ids if token != family.image_token_id])
    assert text.count("".join(parts)) == 1


def test_answers_with_a_typed_image_token_are_marked_whole(processor):
    said = [says("user", PICTURE, "How do I write it?"), says("assistant", "As <image>, so.")]
    batch = inputs_of(processor, said, return_assistant_tokens_mask=True, processor_kwargs={"images": [picture()]})
    learned = [token for token, mask in zip(batch["input_ids"][0], batch["assistant_masks"][0], strict=True) if mask]
    assert IMAGE not in learned
    assert processor.decode(learned).removesuffix(processor.tokenizer.eos_token).strip(" </s>") == "As <image>, so."


def test_control_tokens_can_be_only_text(processor):
    typed = "What do <image> and <|im_end|> mean?"

    def ids_of(text: str, **options) -> list[int]:
        asked = [says("user", PICTURE, text)]
        return inputs_of(processor, asked, processor_kwargs={"images": [picture()]}, **options)["input_ids"][0]

    ids, plain = ids_of(typed, sanitize_control_tokens=True), ids_of("Hi")
    assert typed in processor.decode(ids)
    for token in (IMAGE, processor.tokenizer.eos_token_id):
        assert ids.count(token) == plain.count(token)


def data_url(image: Image.Image) -> str:
    image.save(file := io.BytesIO(), "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


DATA = data_url(picture())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA}},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "low"}},
        {"type": "image_url", "image_url": DATA},
        {"type": "input_image", "image_url": DATA, "detail": "auto"},
        {"type": "input_image", "image_url": {"url": DATA}, "file_id": None},
        {"type": "image", "url": DATA, "text": None},
        {"type": "image", "image_url": {"url": DATA}},
    ],
)
@pytest.mark.parametrize("text", [{"type": "input_text", "text": "What?"}, "What?"], ids=str)
def test_the_forms_of_openai_are_understood(form, processor, part, text):
    expected = inputs_of(processor, [says("user", {"type": "image", "image": picture()}, "What?")])
    got = inputs_of(processor, [{"role": "user", "content": [part, text], "name": None, "tool_calls": []}])
    assert got["input_ids"] == expected["input_ids"]
    assert np.array_equal(got["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (says("user", {"type": "video", "video": "a.mp4", "fps": 2}), "a part 'video' with `fps`, which is not unders"),
        (says("user", {"type": "audio", "audio": "a.wav"}), "a part of type 'audio'"),
        (says("user", {"type": "video_url", "video_url": {"url": "a"}}), "a part of type 'video_url'"),
        (says("user", {"type": "input_audio", "input_audio": {}}), "a part of type 'input_audio'"),
        (says("user", {"type": "file", "file": {}}), "a part of type 'file'"),
        (says("user", {"type": "refusal", "refusal": "No."}), "a part of type 'refusal'"),
        (says("user", {"type": "Image", "image": picture()}), "a part of type 'Image'"),
        (says("user", {"text": "Hi"}), "a part of type None"),
        (says("user", {"type": "text"}), "a part 'text' without a text"),
        (says("user", {"type": "text", "content": "Hi"}), "a part 'text' without a text"),
        (says("user", {"type": "text", "text": "Hi", "image": picture()}), "a part 'text' with `image`"),
        (says("user", {"type": "image", "image": picture(), "max_pixels": 9}), "a part 'image' with `max_pixels`"),
        (says("user", {"type": "image", "image": picture(), "url": DATA}), "a part 'image' with 2 images (image, url)"),
        (says("user", {"type": "image_url", "url": DATA}), "a part 'image_url' with 1 images"),
        (says("user", {"type": "image_url", "image_url": {"uri": DATA}}), "a part 'image_url' without a URL"),
        (says("user", {"type": "image_url", "image_url": {"url": DATA, "size": 1}}), "with `image_url.size`"),
        (says("user", {"type": "input_image", "file_id": "f1"}), "a part 'input_image' with 0 images"),
        (says("user", 3), "a part that is no dict with a `type`, but int"),
        ({"role": "user", "content": 3}, "The content of message 1 is text or a list of parts, got int"),
        ({"role": "user", "content": None}, "Message 1 has no content"),
        ({"role": "user"}, "Message 1 has no content"),
        ({"content": "Hi"}, "Message 1 is no dict with a `role`"),
        (
            says("assistant", "Hi") | {"tool_calls": [{"id": "1"}]},
            "Message 1 has `tool_calls`, which the chat template",
        ),
        (says("assistant", "Hi") | {"reasoning_content": "Hm."}, "Message 1 has `reasoning_content`"),
        (says("tool", "Hi") | {"tool_call_id": "1"}, "Message 1 has `tool_call_id`"),
        (says("user", "Hi") | {"images": [picture()]}, "Message 1 has `images`"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(message, sentence):
    processor = tiny_processor(chat_template=packaged_template("chatml"))
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            processor.apply_chat_template([message], tokenize=tokenize, return_dict=tokenize)


@pytest.mark.parametrize("key", ["tools", "documents"])
def test_tools_and_documents_need_a_template_that_reads_them(processor, key):
    with pytest.raises(ValueError, match=f"The chat template does not read `{key}`"):
        processor.apply_chat_template(QUESTION, **{key: [{"name": "clock", "text": "t"}]})
    template = "{{ messages[0]['content'] }}{% for one in " + key + " %}{{ one['text'] }}{% endfor %}"
    read = processor.apply_chat_template([says("user", "Hi")], chat_template=template, **{key: [{"text": "<image>"}]})
    assert processor(text=read)["input_ids"][0].count(IMAGE) == 0


def test_images_come_in_messages_or_beside_them(processor):
    asked = [says("user", {"type": "image", "image": picture()}, "What?")]
    with pytest.raises(ValueError, match=r"Images come in the messages \(1 do\) or in `processor_kwargs`, not in both"):
        inputs_of(processor, asked, processor_kwargs={"images": [picture()]})


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "message",
    [
        says("user", {"type": "video"}),
        says("user", {"type": "image_url", "image_url": {"url": DATA}}),
        says("assistant", "Hi") | {"tool_calls": [{"function": {"name": "clock"}}]},
    ],
    ids=str,
)
def test_the_templates_refuse_alone_what_they_do_not_know(name, message):
    chat_format = ChatFormat(packaged_template(name), tiny_tokenizer())
    with pytest.raises(ValueError, match=r"refuses the conversation: (Parts of a message|This chat template does not)"):
        chat_format.render([message])


def test_a_switch_for_thinking_is_nothing_to_a_template_without_it(form, processor):
    assert processor.apply_chat_template(QUESTION, enable_thinking=False) == form["question"]


# What is trained is what is asked

THINKERS = {
    "qwen3": THINKING,
    # As DeepSeek R1's: the prompt begins a thought, and answers are written without theirs.
    "r1": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{{ '<Bot>' + m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<Bot><think>\n' }}{% endif %}"
    ),
    # As SmolLM3's: an empty block of its own form where thinking is off; marks of the answers.
    "smollm3": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}"
        "{%- generation -%}{{- m.content.split('</think>')[-1].strip() + '<|im_end|>' }}{%- endgeneration -%}"
        "{{- '\n' }}{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}"
        "{%- endif %}"
    ),
}
TALK = [
    [says("user", PICTURE, "Q1"), says("assistant", "A1")],
    [says("user", PICTURE, "Q1"), says("assistant", "A1"), says("user", "Q2"), says("assistant", " A2\n")],
    [says("user", "Q1"), says("assistant", "<think>\nT1\n</think>\n\nA1"), says("user", "Q2"), says("assistant", "A2")],
    [says("user", "Q1"), says("assistant", "A1"), says("user", "Q2"), says("assistant", "<think>\nT2\n</think>\n\nA2")],
]


@pytest.mark.parametrize("kind", THINKERS)
def test_thinking_templates_are_trained_as_they_are_asked(kind):
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    own = image_aware(THINKERS[kind], "<image>", tokenizer)
    assert ChatFormat(own, tokenizer).check_generation_prompt() is not None
    tokenizer.chat_template = THINKERS[kind]
    template, note = choose_template(tokenizer, Components(vision="", llm="thinker"))
    assert "with thinking off unless `enable_thinking=True` asks for it" in note
    chat_format = ChatFormat(template, tokenizer)
    assert chat_format.check_generation_prompt() is None
    for talk in TALK:
        talk = [m if isinstance(m["content"], list) else says(m["role"], *[m["content"], ""]) for m in talk]
        text, spans = chat_format.render_with_answers(talk)
        answers = [n for n, message in enumerate(talk) if message["role"] == "assistant"]
        for (start, end), number in zip(spans, answers, strict=True):
            said = talk[number]["content"][0]["text"]
            thinks = "</think>" in said
            prompt = chat_format.render(talk[:number], add_generation_prompt=True, enable_thinking=thinks)
            assert text[start:end] == said + "<|im_end|>"
            assert text[:start] == (prompt.removesuffix("<think>\n") if thinks else prompt)
    processor = tiny_processor(chat_template=template)  # a generation prompt is still what a caller chooses
    prompts = [
        processor.apply_chat_template(QUESTION, add_generation_prompt=True, enable_thinking=on) for on in (False, True)
    ]
    assert ["</think>" in prompt for prompt in prompts] == [True, False]


def test_a_template_that_cannot_be_mended_is_told_of():
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n(one word) '")
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = template
    aware, note = choose_template(tokenizer, Components(vision="", llm="chatty"))
    assert "Training needs another template: The chat template asks for an answer after" in note
    assert "(one word) " in ChatFormat(aware, tokenizer).check_generation_prompt()


@pytest.mark.parametrize(
    ("template", "family"),
    [
        *((packaged_template(name), "qwen2" if name == "chatml" else "llama_2") for name in FORMS),
        (CHATML, "qwen2"),
        (LLAMA_3, "llama_3"),
        (LLAMA_2, "llama_2"),
    ],
    ids=[*FORMS, "qwen2", "llama_3", "llama_2"],
)
def test_templates_without_thinking_stay_as_they_are(template, family):
    tokenizer = TOKENIZERS[family]()
    own = image_aware(template, "<image>", tokenizer)
    assert ChatFormat(own, tokenizer).check_generation_prompt() is None
    assert thinking_off(own, tokenizer) == own


# What servers find in a template, by the contracts that vLLM and SGLang document


def reads_of(node, name: str, key: str | None = None) -> bool:
    """Whether an expression is a variable (or its item `key`), filtered, tested or sliced perhaps."""
    if isinstance(node, (nodes.Filter, nodes.Test)) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        return reads_of(node.node, name, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.name == name
    item = node.attr if isinstance(node, nodes.Getattr) else getattr(getattr(node, "arg", None), "value", None)
    return isinstance(node, (nodes.Getattr, nodes.Getitem)) and item == key and reads_of(node.node, name)


def loops_over(tree, name: str, key: str | None = None) -> list[str]:
    """The variables of loops over it; only plain names are understood."""
    loops = [loop for loop in tree.find_all(nodes.For) if reads_of(loop.iter, name, key)]
    assert all(isinstance(loop.target, nodes.Name) for loop in loops)
    return [loop.target.name for loop in loops]


def detected_by_vllm(tree) -> str:
    """A loop over the content of a message of a loop over `messages`, or over what `messages` is assigned to."""
    names = ["messages", *(a.target.name for a in tree.find_all(nodes.Assign) if reads_of(a.node, "messages"))]
    items = [item for name in names for item in loops_over(tree, name)]
    return "openai" if any(loops_over(tree, item, "content") for item in items) else "string"


def detected_by_sglang(tree) -> str:
    """A loop over the content of `message`, `msg` or `m`."""
    return "openai" if any(loops_over(tree, name, "content") for name in ("message", "msg", "m")) else "string"


@pytest.mark.parametrize("detect", [detected_by_vllm, detected_by_sglang])
@pytest.mark.parametrize("name", [*FORMS, "prelude", *THINKERS])
def test_servers_see_that_content_comes_in_parts(name, detect):
    if name in FORMS:
        template = packaged_template(name)
    else:
        tokenizer = qwen_tokenizer()
        template = thinking_off(image_aware(THINKERS.get(name, CHATML), "<image>", tokenizer), tokenizer)
    tree = Environment().parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    assert detect(tree) == "openai"
    assert "content" in loops_over(tree, "message", "content")  # newer vLLM looks for the name, too
    assert detect(Environment().parse(CHATML)) == "string"


def test_the_embedded_checkpoint_has_the_template_of_the_package():
    assert (Path(ms_resampler.TINY) / "chat_template.jinja").read_text() == packaged_template("chatml")
