"""The forms of records: each means what it says, and what is not understood is refused by name and id."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from components import CHATML, TOKENIZERS
from labelled_records import RECORD, turns
from tiny_models import picture, tiny_processor

from ms_resampler import MSResamplerProcessor
from ms_resampler.chat_format import image_aware
from ms_resampler.training.collate import ConversationCollator
from ms_resampler.training.conversations import BadRecord, conversation_of, images_of

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}
SAYS = {"role": "assistant", "content": "A cat."}


def png(seed=0):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def data_uri(seed=0):
    return f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for seed in (0, 1):
        (tmp_path / "images" / f"{seed}.png").write_bytes(png(seed))
    return tmp_path / "images"


def encode(record, processor=None, **options):
    return ConversationCollator(processor or tiny_processor(), max_length=500, **options).encode(record)


def asks(*parts, **fields):
    return {"id": "n7", "messages": [{"role": "user", "content": list(parts)}, SAYS], **fields}


# --- Two forms, one meaning


def test_turns_become_messages_with_images_where_they_were():
    text = {"type": "text"}
    assert conversation_of(RECORD).messages[:3] == [
        {"role": "user", "content": [IMAGE, IMAGE, text | {"text": "Which is older? 🐈"}]},
        {"role": "assistant", "content": [text | {"text": "The first."}]},
        {"role": "user", "content": [text | {"text": "And "}, IMAGE, text | {"text": "this?"}]},
    ]
    windows = RECORD | {
        "conversations": [t | {"value": t["value"].replace("\n", "\r\n")} for t in RECORD["conversations"]]
    }
    assert conversation_of(windows) == conversation_of(RECORD)


OPENAI = {"type": "image_url", "image_url": {"url": "0.png", "detail": "low"}}
FORMS = {
    "LLaVA's turns": {"image": "0.png", "conversations": turns(("human", "<image>\nWhat?"), ("gpt", "A cat."))},
    "turns of a table": {
        "images": [{"bytes": png(), "path": None}],
        "image": None,
        "messages": None,
        "conversations": [t | {"weight": None} for t in turns(("human", "<image>\nWhat?"), ("gpt", "A cat."))],
    },
    "images beside": asks(IMAGE, TEXT, images=["0.png"]),
    "images inside": asks({"type": "image", "path": "0.png"}, TEXT),
    "parts of a table": asks(IMAGE | {"text": None}, TEXT | {"image": None}, image={"bytes": png(), "path": None}),
    "OpenAI's image_url": asks(OPENAI, TEXT),
    "OpenAI's image_url, bare": asks({"type": "image_url", "image_url": "0.png"}, TEXT),
    "OpenAI's data: URI": asks({"type": "image_url", "image_url": {"url": data_uri()}}, TEXT),
    "OpenAI's file: URL": asks({"type": "image_url", "image_url": {"url": "file:"}}, TEXT),
    "OpenAI's input parts": asks({"type": "input_image", "image_url": "0.png"}, TEXT | {"type": "input_text"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_record(form, folder):
    record = {"id": "n7", "folder": folder} | FORMS[form]
    if form == "OpenAI's file: URL":
        record["messages"][0]["content"][0]["image_url"]["url"] = (folder / "0.png").as_uri()
    expected = encode({"id": "n7", "image": picture(), "conversations": FORMS["LLaVA's turns"]["conversations"]})
    row = encode(record)
    assert row.keys() == expected.keys()
    for name in row:
        assert torch.equal(row[name], expected[name])


def test_a_url_is_downloaded(folder, monkeypatch):
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        response = io.BytesIO(png(1))
        response.length = 0
        return response

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    record = asks({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, TEXT, folder=folder)
    assert torch.equal(encode(record)["pixel_values"], encode(asks(IMAGE, TEXT, image=picture(1)))["pixel_values"])
    assert asked == ["https://example.com/a.png"]


def test_images_inside_and_beside_keep_their_places(folder):
    record = asks(IMAGE, {"type": "image", "path": "1.png"}, IMAGE, TEXT, images=["0.png", "0.png"], folder=folder)
    assert images_of(record) == [folder / "0.png", folder / "1.png", folder / "0.png"]


@pytest.mark.parametrize("form", ["messages", "turns, other token"])
def test_a_typed_image_token_is_text(form):
    """A person's `<image>`; in LLaVA's turns, which write `<image>` for an image, the model's own token."""
    token = "<image>" if form == "messages" else "<pic>"
    tokenizer = TOKENIZERS["qwen2"]()
    tokenizer.add_tokens([token], special_tokens=True)
    template = image_aware(CHATML, token, tokenizer)
    fields = {"patch_size": 4, "visual_tokens": 4, "image_token": token, "chat_template": template}
    processor = MSResamplerProcessor(tiny_processor().image_processor, tokenizer, **fields)
    typed, said = f"What is {token}?", f"{token} is a token."
    record = {"id": "p", "image": picture(), "conversations": turns(("human", f"<image>\n{typed}"), ("gpt", said))}
    if form == "messages":
        parts = [IMAGE, {"type": "text", "text": typed}]
        record = asks(*parts, image=picture())
        record["messages"][1] = {"role": "assistant", "content": said}
    row = encode(record, processor)
    ids, labels = row["input_ids"], row["labels"]
    assert (ids == processor.image_token_id).sum() == 4
    assert tokenizer.decode(ids[ids != processor.image_token_id]).count(token) == 2
    assert tokenizer.decode(labels[labels != -100]).strip() == f"{said}<|im_end|>"


# --- Where images are

BACKSLASHES = "sub\\..\\0.png"


@pytest.mark.parametrize("name", ["0.png", "images/0.png", BACKSLASHES, "images\\0.png", "sub/../0.png", "..png"])
def test_paths_are_found_as_people_write_them(name, folder):
    (folder / "sub").mkdir()
    (folder / "..png").write_bytes(png())
    record = asks(IMAGE, TEXT, image=name, folder=folder)
    assert torch.equal(encode(record)["pixel_values"], encode(asks(IMAGE, TEXT, image=picture()))["pixel_values"])


@pytest.mark.parametrize(
    "name", ["../images.txt", "/etc/passwd", "..\\x.png", "a/../../b.png", "ftp://host/a.png", "file:///etc/x"]
)
def test_paths_that_lead_out_of_the_folder_are_refused(name, folder):
    (folder.parent / "images.txt").touch()
    with pytest.raises(BadRecord, match="a path must stay within the folder of images"):
        encode(asks(IMAGE, TEXT, image=name, folder=folder))


@pytest.mark.parametrize("stored", [base64.b64encode(png()).decode(), base64.encodebytes(png()).decode(), data_uri()])
def test_base64_is_the_picture_that_it_stands_for(stored, folder):
    expected = encode(asks(IMAGE, TEXT, image=picture()))["pixel_values"]
    for image in (stored, {"bytes": stored, "path": None}, {"url": stored}):
        assert torch.equal(encode(asks(IMAGE, TEXT, image=image, folder=folder))["pixel_values"], expected)


# --- What is wrong

GOOD = turns(("human", "<image>\nWhat?"), ("gpt", "A cat."))
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": "x"}
VIDEO = {"type": "video", "video": "a.mp4"}
BAD = {
    "no conversation": [
        ({"conversations": None}, "has no `conversations` or `messages`"),
        ({"conversations": []}, "has no `conversations` or `messages`"),
        ({"conversations": "Hi"}, "has no list in `conversations`"),
        ({"messages": [SAYS], "conversations": GOOD}, "has both `conversations` and `messages`"),
    ],
    "malformed turn": [
        ({"conversations": ["Hi"]}, "has no text in turn 1"),
        ({"conversations": [{"from": "human"}]}, "has no text in turn 1"),
        ({"conversations": [{"from": "human", "value": ["<image>", "x"]}]}, "has no text in turn 1"),
    ],
    "unknown role": [
        ({"conversations": turns(("alien", "Hi"))}, "has a turn 1 of 'alien'; known are human"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "has a turn 1 of \"['human']\""),
        (asks(TEXT) | {"messages": [{"role": "tool", "content": "x"}]}, "has a turn 1 of 'tool'"),
    ],
    "empty answer": [({"conversations": turns(("human", "<image>"), ("gpt", " \n"))}, "an empty answer in turn 2")],
    "nothing to learn": [({"conversations": turns(("human", "<image>"))}, "no answer to learn from")],
    "image in an answer": [
        ({"conversations": turns(("human", "?"), ("gpt", "<image>"))}, "an <image> in an answer"),
    ],
    "image count": [
        ({"image": None}, "has 1 <image> placeholders, but 0 images"),
        ({"image": [picture(), picture()]}, "has 1 <image> placeholders, but 2 images"),
        (asks(IMAGE, TEXT, image=None), "has 1 parts of type image without a source, but 0 images"),
        (asks(TEXT | {"text": "<image>"}, image="0.png"), "has 0 parts of type image without a source, but 1"),
        (asks({"type": "image", "path": "0.png"}, image="0.png"), "has 0 parts of type image without a source, but 1"),
    ],
    "missing image": [({"image": "missing.png"}, "has no image at "), ({"image": "a\0.png"}, "has no image at ")],
    "unreadable image": [
        ({"image": "text.png"}, "is not an image that can be read"),
        ({"image": "half.png"}, "could not be read as an image"),
        ({"image": b"abc"}, "is not an image that can be read"),
        ({"image": 5}, "has an image that is of type int"),
        ({"image": [["0.png"]]}, "has an image that is of type list"),
        ({"image": {"name": "0.png"}}, "has an image with the fields name"),
        ({"image": "data:image/png;base64,abc"}, "has a data: URI that cannot be decoded"),
        ({"image": np.zeros((0, 3))}, "cannot be read"),
    ],
    "damaged text": [
        ({"conversations": turns(("human", "<image>"), ("gpt", "cat \ud83d"))}, "a character that is none (\\ud83d)"),
    ],
    "not understood": [
        ({"videos": ["a.mp4"]}, "has `videos`, which is not read"),
        ({"tools": [{}]}, "has `tools`, which is not read"),
        ({"image_path": "0.png"}, "has `image_path`, which is not read: call it `images`"),
        ({"images": [picture()]}, "has both `image` and `images`"),
        ({"conversations": [GOOD[0] | {"video": "a.mp4"}, GOOD[1]]}, "has `video` in turn 1"),
        (asks(VIDEO, TEXT), "Message 1 has a part of type 'video'"),
        (asks({"type": "input_audio", "input_audio": {}}), "Message 1 has a part of type 'input_audio'"),
        (asks({"type": "file", "file": {}}), "Message 1 has a part of type 'file'"),
        (asks(TEXT | {"text": 5}), "Message 1 has a part 'text' without a text"),
        (asks(IMAGE | {"crop": [1]}, TEXT), "Message 1 has a part 'image' with `crop`"),
        (asks(TEXT) | {"messages": [asks(TEXT)["messages"][0], CALL]}, "Message 2 has `tool_calls`"),
        (asks(TEXT) | {"messages": [{"role": "user", "content": None}, SAYS]}, "Message 1 has no content"),
        (asks(TEXT) | {"messages": [{"content": "x"}, SAYS]}, "Message 1 is no dict with a `role`"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "sentence"), [(kind, *case) for kind in BAD for case in BAD[kind]])
def test_bad_records_are_named_and_sorted(kind, changes, sentence, folder):
    (folder / "text.png").write_text("not a picture")
    picture(0, (200, 200)).save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:5000])
    llava = {"image": "0.png", "conversations": GOOD}
    record = {"id": "n7", "folder": folder} | (changes if "messages" in changes else llava | changes)
    with pytest.raises(BadRecord, match=f"^Record n7 .*{re.escape(sentence)}") as error:
        encode(record)
    assert error.value.kind == kind


def test_a_name_is_printed_in_one_short_line():
    for name in ("a\nb\x1b[31m", "\ud83d", {"x": ["y"] * 99}, None, "z" * 999):
        with pytest.raises(BadRecord) as error:
            encode({"id": name})
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 200
