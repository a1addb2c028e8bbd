"""The parts of the Space, without a server."""

import ast
import base64
import io
import json
import re
import sys
import time
import types
import weakref
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import space_server
import tiny_models
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from ms_resampler import TINY
from ms_resampler.demo import PEER

import answering  # isort: skip (space_server made it importable)
import app
import ask_page
import compare_page
import conversation
import elements
import examples
import layers
import measures
import pictures
import proof
import scope_view
import settings
import uploads
import words
from pictures import Refusal

QUESTION = "What is this?"
PLAIN = settings.Settings()


@pytest.fixture(scope="module")
def answerer():
    return space_server.make_answerer()


@pytest.fixture(scope="module")
def without_scopes():
    return space_server.make_answerer(projector={"projector_type": "avg_pool"})


@pytest.fixture
def maps(answerer):
    return answerer.look([tiny_models.picture()], PLAIN)[0]


def turns_about(*images, question=QUESTION):
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}], list(images)


# --- What the model says ----------------------------------------------------------------------------------------


def test_maps_are_what_the_model_says(answerer, maps):
    pixels = answerer.processor.image_processor([tiny_models.picture()], return_tensors="pt")["pixel_values"]
    features = answerer.model.get_image_features(pixels, output_scopes=True)
    np.testing.assert_allclose(maps.weights, features.scope_weights[0].detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(maps.attentions, features.scope_attentions[0].detach().numpy(), atol=1e-6)
    assert answerer.scopes == ["local", "regional", "global"]
    assert (maps.token_grid, maps.patch_grid, maps.picture.size) == ((2, 2), (6, 6), (24, 24))


def test_another_budget_is_another_grid_of_the_same_model(answerer):
    (nine,) = answerer.look([tiny_models.picture()], settings.Settings(visual_tokens=9))
    pixels = answerer.processor.image_processor([tiny_models.picture()], return_tensors="pt")["pixel_values"]
    features = answerer.model.get_image_features(pixels, token_grids=torch.tensor([[3, 3]]), output_scopes=True)
    assert nine.token_grid == (3, 3)
    np.testing.assert_allclose(nine.attentions, features.scope_attentions[0].detach().numpy(), atol=1e-6)


def test_every_budget_that_is_offered_can_be_asked_for(answerer):
    assert answerer.budgets() == [1, 4, 9, 16, 25, 36]
    for budget in answerer.budgets():
        (maps,) = answerer.look([tiny_models.picture()], settings.Settings(visual_tokens=budget))
        assert maps.weights.shape == (3, budget)


def test_pictures_of_one_question_do_not_see_each_other(answerer):
    images = [tiny_models.picture(seed) for seed in range(3)]
    together = answerer.look(images, PLAIN)
    for image, one in zip(images, together, strict=True):
        (alone,) = answerer.look([image], PLAIN)
        np.testing.assert_allclose(one.weights, alone.weights, atol=1e-5)
        np.testing.assert_allclose(one.attentions, alone.attentions, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(one.picture), np.asarray(alone.picture))


def test_seen_picture_is_the_crop_that_the_processor_made(maps):
    height, width = 30, 40  # the short side becomes 24, then the middle 24 x 24 are kept
    whole = tiny_models.picture(size=(height, width)).resize((32, 24), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(np.asarray(maps.picture), np.asarray(whole)[:, 4:28], atol=2)


def test_of_a_picture_that_a_tower_takes_in_patches_a_small_copy_is_kept():
    picture = Image.new("RGB", (3000, 1500))
    assert answering.seen_picture(None, torch.zeros(4, 48), picture).size == (1024, 512)
    assert picture.size == (3000, 1500)


@pytest.mark.parametrize(
    ("images", "wanted", "options"),
    [
        (1, settings.Settings(max_new_tokens=12), {}),
        (2, settings.Settings(max_new_tokens=12, visual_tokens=9, system_prompt="Be brief."), {"visual_tokens": 9}),
        (1, settings.Settings(max_new_tokens=12, temperature=0.7, top_p=0.9), {}),
    ],
    ids=["plain", "two pictures, budget, system prompt", "sampled"],
)
def test_streamed_answer_is_the_one_that_pixels_give(answerer, images, wanted, options):
    turns, seen = turns_about(*(tiny_models.picture(seed) for seed in range(images)))
    system = [{"role": "system", "content": wanted.system_prompt}] if wanted.system_prompt else []
    inputs = answerer.processor.apply_chat_template(
        [*system, *turns],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0} if wanted.temperature else {}
    torch.manual_seed(3)
    ids = answerer.model.generate(**inputs, max_new_tokens=12, **sampling)
    expected = answerer.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    torch.manual_seed(3)
    steps = list(answerer.reply(answerer.prepare(turns, seen, wanted), wanted))
    assert steps[-1].text == expected != ""
    assert all(after.text.startswith(before.text) for before, after in pairwise(steps))
    assert [len(step.maps or []) for step in steps] == [images] + [0] * (len(steps) - 1)
    assert 0 < steps[0].milliseconds <= steps[-1].milliseconds


def test_a_second_question_about_a_picture_does_not_read_it_again(monkeypatch):
    answerer, fresh = space_server.make_answerer(), space_server.make_answerer()
    reads, read = [], answerer.model.get_image_features

    def counted(*args, **options):
        reads.append(options)
        return read(*args, **options)

    def steps(asked, picture, question, budget=None):
        wanted = settings.Settings(max_new_tokens=12, visual_tokens=budget)
        return list(
            asked.reply(asked.prepare(*turns_about(tiny_models.picture(picture), question=question), wanted), wanted)
        )

    monkeypatch.setattr(answerer.model, "get_image_features", counted)
    first, second, alone = steps(answerer, 0, "What?"), steps(answerer, 0, "Where?"), steps(fresh, 0, "Where?")
    assert len(reads) == 1
    assert first[0].reading > 0 == second[0].reading
    assert first[-1].text != second[-1].text == alone[-1].text
    np.testing.assert_array_equal(second[0].maps[0].attentions, alone[0].maps[0].attentions)
    steps(answerer, 0, "What?", budget=9)
    steps(answerer, 1, "What?")
    assert len(reads) == 3
    answerer.forget()
    steps(answerer, 0, "What?")
    assert len(reads) == 4


def test_no_more_readings_are_kept_than_allowed(answerer):
    answerer.forget()
    kept = [weakref.ref(answerer.look([tiny_models.picture(seed)], PLAIN)[0]) for seed in range(answering.READINGS + 3)]
    assert [one() is not None for one in kept] == [False] * 3 + [True] * answering.READINGS


def test_closing_the_stream_stops_the_generation():
    slow = space_server.slowed(space_server.make_answerer(), 0.02)
    stream = slow.reply(slow.prepare(*turns_about(tiny_models.picture()), PLAIN), PLAIN)
    next(stream)
    stream.close()
    time.sleep(0.1)  # the token that was under way
    made = slow.model.tokens_made
    time.sleep(0.2)
    assert slow.model.tokens_made == made < PLAIN.max_new_tokens


def test_a_failing_generation_raises_where_the_answer_is_read(answerer):
    prompt = answerer.prepare(*turns_about(tiny_models.picture()), PLAIN)
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(answerer.reply(prompt, settings.Settings(max_new_tokens=-1)))


def test_an_answer_ends_with_the_positions_of_the_model(answerer):
    long = "x" * 200  # of 256 positions
    prompt = answerer.prepare(*turns_about(tiny_models.picture(), question=long), PLAIN)
    *_, last = answerer.reply(prompt, PLAIN)
    room = 256 - prompt.inputs["input_ids"].shape[1]
    assert 0 < len(last.text) <= room < PLAIN.max_new_tokens
    with pytest.raises(Refusal, match="too many for this model"):
        answerer.prepare(*turns_about(tiny_models.picture(), question=2 * long), PLAIN)


def test_what_a_model_cannot_do_is_refused_in_its_own_words(answerer, monkeypatch):
    asked = turns_about(tiny_models.picture())
    with pytest.raises(Refusal, match="7 visual tokens cannot be laid out"):
        answerer.prepare(*asked, settings.Settings(visual_tokens=7))
    with pytest.raises(Refusal, match="impossible for 6 x 6 = 36 patches"):
        answerer.prepare(*asked, settings.Settings(visual_tokens=64))
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    monkeypatch.setattr(answerer.processor, "chat_template", template + tiny_models.CHAT_TEMPLATE)
    with pytest.raises(Refusal, match="takes no system prompt"):
        answerer.prepare(*asked, settings.Settings(system_prompt="Be brief."))
    fixed = space_server.make_answerer(projector={"projector_type": "pixel_shuffle", "visual_tokens": 9})
    with pytest.raises(Refusal, match="pixel_shuffle"):
        next(fixed.reply(fixed.prepare(*asked, settings.Settings(visual_tokens=4)), PLAIN))


def test_a_projector_without_scopes_answers_and_shows_no_maps(without_scopes):
    prompt = without_scopes.prepare(*turns_about(tiny_models.picture()), PLAIN)
    first, *_, last = without_scopes.reply(prompt, PLAIN)
    assert last.text
    assert without_scopes.scopes == []
    assert (first.maps[0].weights.shape, first.maps[0].attentions.shape) == ((0, 4), (0, 4, 36))
    view = elements.scope_view(without_scopes, "view", "Maps", beside="#chat")
    assert "avg_pool, has no scopes" in view.props["without_scopes"]


def test_zerogpu_gets_bound_functions(monkeypatch):
    taken = []
    monkeypatch.setattr(answering, "spaces", types.SimpleNamespace(GPU=lambda task: taken.append(task) or task))
    made = space_server.make_answerer()
    assert {task.__name__ for task in taken} == {"reply", "look", "attend", "prove", "by_layer", "measure"}
    assert all(task.__self__ is made for task in taken)


# --- Words and what they attended to ----------------------------------------------------------------------------


SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("language_model", "changes", "whole_layers"), [("qwen3", {}, [0, 1]), ("gemma3_text", SLIDING, [1])]
)
@pytest.mark.parametrize("count", [1, 2])
def test_words_attend_as_in_one_pass_over_everything(language_model, changes, whole_layers, count):
    answerer = space_server.make_answerer(text=language_model, text_changes=changes)
    asked = turns_about(*(tiny_models.picture(seed) for seed in range(count)))
    answer = "ab cad  e."
    found = answerer.attend(answerer.prepare(*asked, PLAIN), answer)
    assert answerer.model.model.language_model.config._attn_implementation == "sdpa"

    inputs = answerer.prepare(*asked, PLAIN).inputs
    prompt = inputs.pop("input_ids")
    letters = answerer.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert len(letters) == len(answer)
    answerer.model.model.language_model.set_attn_implementation("eager")
    everything = torch.cat([prompt, torch.tensor([letters])], dim=1)
    pixels = {key: inputs[key] for key in inputs if key != "attention_mask"}
    with torch.no_grad():
        layers = answerer.model(input_ids=everything, **pixels, output_attentions=True).attentions
    rows = torch.stack([layers[number] for number in whole_layers]).mean(dim=(0, 2))[0]
    to_pictures = rows[:, (everything[0] == answerer.model.config.image_token_id)]
    first = prompt.shape[1] - 1  # the place from which the first letter was predicted
    expected = {"ab": [0, 1], "cad": [3, 4, 5], "e.": [8, 9]}
    assert [word.text for word in found] == list(expected)
    for word in found:
        places = [first + number for number in expected[word.text]]
        np.testing.assert_allclose(word.shares, to_pictures[places].mean(dim=0).numpy(), atol=1e-5)
        assert word.shares.shape == (4 * count,)
        assert 0 < word.shares.sum() < 1


def test_a_token_belongs_to_the_words_that_it_touches():
    text = "a bc, d"
    assert list(words.words_of(text, [(0, 1), (1, 4), (4, 5), (5, 7)])) == [(0, 1, [0]), (2, 5, [1, 2]), (6, 7, [3])]
    assert list(words.words_of("  ", [(0, 2)])) == []


# --- The conversation, and what may be asked --------------------------------------------------------------------


def test_a_topic_starts_with_the_last_question_with_pictures(picture_file):
    history = [
        {"role": "user", "content": [{"path": "an older one"}, "Which?"]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": [{"type": "file", "file": {"path": picture_file}}, {"path": picture_file}, "And?"]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        {"role": "user", "content": ["Why?"]},
    ]
    turns, images = conversation.topic(history)
    assert [image.size for image in images] == [tiny_models.picture().size] * 2
    assert [part["type"] for part in turns[0]["content"]] == ["image", "image", "text"]
    assert [turn["content"][-1]["text"] for turn in turns] == ["And?", "This.", "Why?"]
    assert conversation.last_question(history) == 4
    assert conversation.answers_in(history) == [1, 3]


def test_what_stands_for_an_answer_is_not_one_that_the_model_gave(picture_file):
    first = conversation.user_turn(QUESTION, [picture_file], [])
    history = [first, conversation.assistant_turn(""), {"role": "user", "content": ["…"]}]
    turns, _ = conversation.topic(history)
    assert [turn["content"][-1]["text"] for turn in turns] == [QUESTION, "", "…"]


@pytest.mark.parametrize(
    ("text", "files", "sentence"),
    [
        (QUESTION, [], "add a picture"),
        (QUESTION, ["a.png"] * 5, "at most 4 pictures to a question; these are 5"),
        ("  ", ["picture"], "type a question"),
        ("x" * 501, ["picture"], "501 characters"),
        (QUESTION, ["text"], "cannot be read"),
        (QUESTION, ["missing"], "no longer here"),
        (QUESTION, ["wide"], "million pixels"),
        (QUESTION, ["heavy"], "larger than 20 MB"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(text, files, sentence, tmp_path, picture_file):
    paths = {"picture": picture_file} | {name: str(tmp_path / name) for name in ("text", "wide", "heavy", "missing")}
    (tmp_path / "text").write_text("no picture")
    Image.new("1", (8000, 5001)).save(paths["wide"], "PNG")
    with open(paths["heavy"], "wb") as heavy:
        heavy.truncate(21 * 2**20)
    with pytest.raises(Refusal, match=sentence) as refusal:
        conversation.topic([conversation.user_turn(text, [paths.get(name, name) for name in files], [])])
    assert refusal.value.message.count(".") == 1


def test_a_later_question_needs_no_picture(picture_file):
    first = conversation.user_turn(QUESTION, [picture_file], [])
    assert conversation.user_turn("And now?", [], [first])["content"] == [{"type": "text", "text": "And now?"}]


def test_texts_are_html_in_the_chat_and_nowhere_else(picture_file):
    text = "1<b> &lt; &amp;amp; <img src=x>\n\ttab $$x$$"
    asked, answered = conversation.user_turn(text, [picture_file], []), conversation.assistant_turn(text)
    assert "<" not in asked["content"][-1]["text"]
    assert [conversation.text_of(turn) for turn in (asked, answered)] == [text, text]
    turns, _ = conversation.topic([asked, answered])
    assert [turn["content"][-1]["text"] for turn in turns] == [text, text]
    shown = gr.Chatbot(render_markdown=False).postprocess(conversation.as_sent([asked, answered]))
    assert [turn["content"][-1]["text"] for turn in shown.model_dump()] == [asked["content"][-1]["text"]] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"visual_tokens": 0}, "number of visual tokens must be a number from 1"),
        ({"visual_tokens": 2.5}, "must be a whole number"),
        ({"visual_tokens": "many"}, "must be a number"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"top_p": 0}, "top-p must be a number from 0.05 to 1"),
        ({"max_new_tokens": None}, "length limit must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(changes, sentence):
    good = {"visual_tokens": 36.0, "system_prompt": " Hi ", "temperature": 0, "top_p": "0.9", "max_new_tokens": 64}
    assert settings.checked(**good) == settings.Settings(36, "Hi", 0.0, 0.9, 64)
    with pytest.raises(Refusal, match=sentence):
        settings.checked(**good | changes)


LIMITS = {
    "pictures of a question": (pictures.MAX_PICTURES, lambda over, _: pictures.check_count(["picture"] * over)),
    "megabytes of a file": (pictures.MAX_FILE_MEGABYTES, lambda over, path: open_one(path, bytes(over * 2**20))),
    "million pixels of a picture": (pictures.MAX_PIXELS // 10**6, lambda over, path: open_one(path, pixels(over))),
    "characters of a question": (
        conversation.MAX_QUESTION_CHARACTERS,
        lambda over, _: conversation.check_question("x" * over),
    ),
    "characters of a system prompt": (
        settings.MAX_SYSTEM_CHARACTERS,
        lambda over, _: checked(system_prompt="x" * over),
    ),
    "temperature": (settings.MAX_TEMPERATURE, lambda over, _: checked(temperature=over)),
    "top-p": (1, lambda over, _: checked(top_p=over)),
    "tiles of a picture": (settings.MOST_TILES, lambda over, _: checked(tiles=over)),
    "tokens of an answer": (settings.MAX_NEW_TOKENS, lambda over, _: checked(max_new_tokens=over)),
}


def open_one(path, content):
    path.write_bytes(content)
    return pictures.open_picture(path)


def pixels(millions):
    file = io.BytesIO()
    Image.new("1", (1000 * millions, 1000)).save(file, "PNG")
    return file.getvalue()


def checked(**changes):
    good = {"visual_tokens": None, "system_prompt": "", "temperature": 0, "top_p": 1, "max_new_tokens": 64}
    return settings.checked(**good | changes)


def test_the_limits_in_the_docs_are_those_that_hold(tmp_path):
    docs = (space_server.SPACE.parent / "docs" / "space.md").read_text().split("## Limits")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([a-z][\w -]+) \| (.+) \|$", docs, flags=re.MULTILINE))
    assert rows.pop("of") == "limit | what one is told"
    limit, told = rows.pop("questions that wait").split(" | ")
    assert (int(limit), told) == (app.QUEUE_LENGTH, "This application is currently busy. Please try again.")
    assert rows.keys() == LIMITS.keys()
    for name, (limit, exceed) in LIMITS.items():
        with pytest.raises(Refusal) as refusal:
            exceed(limit + 1, tmp_path / "file")
        shown, told = rows[name].split(" | ")
        assert (float(shown.split()[-1]), told) == (limit, refusal.value.message)
    words = " ".join(docs.split())
    assert f"keeps what it needs to serve {app.SESSIONS} visitors" in words
    assert f"last {answering.READINGS} sets of pictures" in words
    assert f"at most {uploads.UPLOADS_MEGABYTES} MB of uploads" in words
    assert f"{uploads.UPLOAD_SECONDS // 60} minutes after their last use" in words


def test_a_page_that_shows_only_the_latest_of_many_changes_has_the_maps(answerer, picture_file):
    plain = (None, "", 0, 1, 6)
    message = {"text": QUESTION, "files": [picture_file]}
    asked, known = [conversation.user_turn(QUESTION, [picture_file], [])], examples.examples_for("tiny")
    *_, (_, view) = ask_page.AskPage(answerer, known).answer(asked, *plain)
    *_, shown = compare_page.ComparePage(answerer, answerer, known).compare(message, 1, False, 4, 9)
    _, one, one_view, other, other_view, _ = shown
    grids = [value["pictures"][0]["token_grid"] for value in (view, one_view, other_view)]
    assert grids == [[2, 2], [2, 2], [3, 3]]
    assert one != other != ""


@pytest.mark.parametrize(
    ("number", "answer", "sentence"),
    [
        (1, "ab", "That answer was taken back; please ask again."),
        (0, "", "That answer has no words; please ask again."),
    ],
)
def test_words_that_are_not_there_are_not_played(number, answer, sentence, answerer, picture_file, monkeypatch):
    warned = []
    monkeypatch.setattr(gr, "Warning", lambda message, title: warned.append(message))
    event = types.SimpleNamespace(number=number, request=1, visual_tokens=None, system_prompt="", tiles=None)
    history = [conversation.user_turn(QUESTION, [picture_file], []), conversation.assistant_turn(answer)]
    assert ask_page.AskPage(answerer, None).words(history, event) == {"number": number, "request": 1}
    assert warned == [sentence]


def test_foreign_words_in_a_message_are_text(monkeypatch):
    warned = []
    monkeypatch.setattr(gr, "Warning", lambda message, title: warned.append(message))
    with ask_page.warnings_in_a_sentence():
        raise Refusal("No <img src=x>.")
    assert warned == ["No &lt;img src=x&gt;."]
    with pytest.raises(Refusal, match="No <img src=x>"), ask_page.errors_in_a_sentence(str):
        raise Refusal("No <img src=x>.")


def test_each_model_is_loaded_at_its_revision(monkeypatch):
    monkeypatch.setattr(app, "load", lambda *asked: asked)
    for name in ("COMPARE_MODEL_ID", "COMPARE_MODEL_REVISION"):
        monkeypatch.delenv(name, raising=False)
    assert app.loaded("COMPARE_MODEL") is None
    monkeypatch.setenv("COMPARE_MODEL_ID", "acme/other")
    assert app.loaded("COMPARE_MODEL") == ("acme/other", None)
    monkeypatch.setenv("COMPARE_MODEL_REVISION", "v1")
    assert app.loaded("COMPARE_MODEL") == ("acme/other", "v1")


def test_a_picture_of_an_unusual_mode_is_reduced():
    for mode in ("1", "P", "LA", "I;16", "CMYK"):
        assert pictures.over_white(pictures.reduced(Image.new(mode, (4000, 1000)))).size == (2048, 512)


@pytest.mark.parametrize("size", [(3000, 2000), (2000, 3000), (6000, 500)])
def test_a_reduced_picture_is_to_a_tower_what_the_whole_one_is(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    whole = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=95)
    small = pictures.reduced(Image.open(file))
    assert small.width * small.height <= pictures.KEPT_PIXELS
    assert small.width / small.height == pytest.approx(size[0] / size[1], rel=0.01)
    look = CLIPImageProcessorPil()
    seen, wanted = (look(image, return_tensors="pt")["pixel_values"] for image in (small, whole))
    assert (seen - wanted).abs().mean() < 0.03 * wanted.abs().mean()


def test_photographs_of_telephones_are_read(tmp_path):
    picture = tiny_models.picture(size=(64, 96))
    for kind in ("HEIF", "AVIF"):
        picture.save(tmp_path / "photograph", kind, quality=95)
        read = pictures.open_picture(tmp_path / "photograph")
        np.testing.assert_allclose(np.asarray(read).mean((0, 1)), np.asarray(picture).mean((0, 1)), atol=3)


def test_an_upload_becomes_a_small_upright_png(tmp_path):
    path = tmp_path / "upload.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (3000, 2000), "red").save(path, exif=exif)
    assert uploads.reduce_file(path) == ""
    with Image.open(path) as kept:
        assert (kept.format, len(kept.getexif())) == ("PNG", 0)
        assert kept.width < kept.height
        assert kept.width * kept.height <= pictures.KEPT_PIXELS
    assert list(tmp_path.iterdir()) == [path]


def test_uploads_beyond_the_quota_or_long_unused_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "UPLOADS_MEGABYTES", 3)
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "picture.png").write_bytes(bytes(2**20))
        time.sleep(0.02)
    conversation.topic([conversation.turn_of("user", QUESTION, [examples.EXAMPLES / "scene_15.png"])])
    uploads.make_room(2**20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]
    monkeypatch.setattr(uploads, "time", lambda: time.time() + uploads.UPLOAD_SECONDS + 1)
    uploads.make_room(0)
    assert list(tmp_path.iterdir()) == []


def test_an_upload_that_is_asked_about_lives_on(tmp_path, picture_file):
    before = Path(picture_file).stat().st_ctime
    time.sleep(0.02)
    conversation.topic([conversation.user_turn(QUESTION, [picture_file], [])])
    assert Path(picture_file).stat().st_ctime > before


def test_transparent_picture_stands_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert pictures.over_white(clear).getpixel((0, 0)) == (255, 255, 255)


# --- What the page is given -------------------------------------------------------------------------------------


def unpacked(text, kind):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=kind)


def test_the_view_is_given_the_maps(answerer, maps):
    step, usual = answering.Step("This.", 12.3, 4.5, [maps]), layers.Usual([((2, 2), np.arange(24.0).reshape(2, 3, 4))])
    value = scope_view.view_value(answerer.scopes, step, usual, settings.Settings(visual_tokens=4), number=2)
    (picture,) = value["pictures"]
    assert (value["number"], value["milliseconds"], value["reading"]) == (2, 12.3, 4.5)
    assert [scope["name"] for scope in value["scopes"]] == answerer.scopes
    assert (picture["token_grid"], picture["patch_grid"], picture["size"]) == ([2, 2], [6, 6], [24, 24])
    np.testing.assert_array_equal(unpacked(picture["weights"], "<f4").reshape(3, 4), maps.weights)
    assert unpacked(picture["usual"], "<f4").tolist() == list(range(12, 24))  # of the last layer
    peaks = unpacked(picture["peaks"], "<f4").reshape(3, 4, 1)
    shares = unpacked(picture["steps"], "<u2").reshape(3, 4, 36) / 65535 * peaks
    assert (np.abs(shares - maps.attentions) <= peaks / 130000).all()  # half a step, and the digits of float32


def test_rows_without_attention_stay_empty():
    packed = scope_view.packed_rows(np.zeros((2, 3)))
    assert unpacked(packed["steps"], "<u2").tolist() == [0] * 6
    assert unpacked(scope_view.packed_rows(np.zeros((0, 4, 9)))["steps"], "<u2").size == 0


def test_scopes_have_colours_of_their_own():
    assert len({*scope_view.PALETTE, scope_view.FUSED_COLOUR}) == 6
    three = scope_view.scope_legend(["local", "regional", "global"])
    assert [scope["colour"] for scope in three] == list(scope_view.PALETTE[:3])
    assert scope_view.scope_legend(["global"]) == three[2:]  # the same scope, the same colour, in every model
    assert [scope["name"] for scope in scope_view.scope_legend(["local 0.3", "local 0.6"])] == [
        "local 0.3",
        "local 0.6",
    ]


# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
COLOUR_BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(),
}
RGB_TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab(colours, seen_through):
    """CIE L*a*b* of "#rrggbb" colours as somebody sees them, (n, 3)."""
    rgb = np.array([[int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ np.array(seen_through).T
    xyz = linear.clip(0, 1) @ np.array(RGB_TO_XYZ).T / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
def test_colour_blind_people_tell_the_scopes_apart(kind):
    seen = lab([*scope_view.PALETTE[:3], scope_view.FUSED_COLOUR], COLOUR_BLINDNESS[kind])
    distances = np.linalg.norm(seen[:, None] - seen, axis=-1) + 1000 * np.eye(len(seen))
    assert distances.min() > 15  # six times what can just be noticed


def test_the_note_on_the_projector_to_compare_with_is_found_and_true(answerer):
    about, peer = examples.read_examples(), space_server.make_answerer()
    peer.name = Path(PEER).name
    assert list(about["models"]) == ["tiny", peer.name, "small"]
    radios = [block for block in app.build_demo(answerer, peer).blocks.values() if isinstance(block, gr.Radio)]
    assert [radio.info for radio in radios] == [about["models"][peer.name]]
    for folder in (PEER, TINY):
        scores = json.loads((Path(folder) / "training_record.json").read_text())["scores"]
        assert f"{100 * np.mean([score['mean'] for score in scores]):.1f} %" in radios[0].info


@pytest.mark.parametrize(("name", "paragraphs"), [("tiny", 2), ("somebody's", 1)])
def test_the_note_on_the_model_is_shown_for_that_model_only(answerer, monkeypatch, name, paragraphs):
    monkeypatch.setattr(answerer, "name", name)
    (header,) = (block.value for block in app.build_demo(answerer).blocks.values() if block.elem_id == "header")
    assert header.count("<p") == paragraphs
    assert (examples.read_examples()["models"]["tiny"].partition(".")[0] in header) == (name == "tiny")


@torch.no_grad()
def test_tokens_that_are_words_say_the_likeliest(answerer, monkeypatch):
    monkeypatch.setattr(answerer.model.config, "visual_words", [260, 261, 262, 263])
    picture = Image.new("RGB", (96, 96), "red")
    (maps,) = answerer.look([picture], settings.Settings())
    pixels = answerer.processor(images=[picture], return_tensors="pt")
    (shares,) = answerer.model.get_image_features(**pixels).word_weights
    vocabulary = [answerer.processor.tokenizer.decode([token]).strip() for token in (260, 261, 262, 263)]
    for said, row in zip(maps.words, shares, strict=True):
        assert [word for word, _ in said] == [vocabulary[place] for place in row.argsort(descending=True)[:3]]
        np.testing.assert_allclose([share for _, share in said], row.sort(descending=True).values[:3], atol=1e-5)
    step, usual = answering.Step("", 1, 1, [maps]), layers.Usual([((2, 2), maps.weights[None])])
    (shown,) = scope_view.view_value(answerer.scopes, step, usual, settings.Settings())["pictures"]
    assert shown["words"] == maps.words


def test_examples_are_there_and_their_truth_is_found():
    for name, side in (("tiny", 96), ("small", 256)):
        known = examples.examples_for(name)
        assert [example.large for example in known.shown] == [False] * 6 + [True] * (name == "tiny")
        assert (len(known.played) > 300) == (name == "tiny")
        for number, example in enumerate([*known.shown, *known.played]):
            assert conversation.check_question(example.question)
            assert pictures.open_picture(example.path).size == (side * (1 + 2 * example.large),) * 2
            assert known[number] == example
            assert known.number_of(conversation.turn_of("user", example.question, [example.path])) == number
        assert known.number_of(conversation.turn_of("user", "Else?", [known.shown[0].path])) is None
        assert all(example.truth for example in known.played)
    strange = examples.examples_for("somebody's")  # whose answers may be put in other words
    assert strange.played == [] == [example for example in strange.shown if example.truth]


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Dog.", "dog", True),
        ("top", "top left", False),
        ("left: red 7, top: blue star", "top: blue star, left: red 7", True),
        ("left: red 7", "top: blue star, left: red 7", False),
        ("Yes, it is.", "yes", True),
        ("No, there is no dog.", "yes", False),
    ],
)
def test_answers_are_right_or_wrong(answer, truth, right):
    assert examples.is_right(answer, truth) == right


# --- Proof, and numbers -----------------------------------------------------------------------------------------


def test_words_have_the_probability_that_the_model_gives_them(answerer):
    asked = turns_about(tiny_models.picture())
    ab, cad = answerer.attend(answerer.prepare(*asked, PLAIN), "ab cad")
    inputs = answerer.prepare(*asked, PLAIN).inputs
    letters = answerer.processor.tokenizer("ab cad", add_special_tokens=False, return_tensors="pt")["input_ids"]
    pixels = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = answerer.model(input_ids=torch.cat([inputs["input_ids"], letters], dim=1), **pixels).logits[0]
    chances = logits[-7:-1].softmax(dim=-1)
    each = chances[range(6), letters[0]]
    assert ab.probability == pytest.approx(float(each[:2].prod()), rel=1e-3)
    assert cad.probability == pytest.approx(float(each[3:].prod()), rel=1e-3)
    np.testing.assert_allclose([share for _, share in cad.likeliest], chances[3].topk(3).values, rtol=1e-3)


@pytest.mark.parametrize("projector", ["ms_resampler", "ms_resampler_branches"])
def test_without_a_scope_no_token_trusts_it(projector):
    answerer = space_server.make_answerer(projector={"projector_type": projector})
    gates = [module for name, module in answerer.model.named_modules() if name.endswith(".gate")]
    for gate in gates:
        torch.nn.init.normal_(gate.weight)
    (before,) = answerer.look([tiny_models.picture()], PLAIN)
    answerer.forget()
    with proof.without_scope(answerer.model.model.projector, 1):
        (without,) = answerer.look([tiny_models.picture()], PLAIN)
    left = before.weights[[0, 2]] / before.weights[[0, 2]].sum(axis=0)
    assert (without.weights[1] == 0).all()
    np.testing.assert_allclose(without.weights.sum(axis=0), 1, atol=1e-6)
    if projector == "ms_resampler":  # branches have a gate for each head
        np.testing.assert_allclose(without.weights[[0, 2]], left, atol=1e-5)
    answerer.forget()
    np.testing.assert_array_equal(answerer.look([tiny_models.picture()], PLAIN)[0].weights, before.weights)


def test_what_is_covered_has_the_mean_colour_and_the_rest_stays():
    pixels = torch.rand(3, 24, 24)
    covered = proof.cover(pixels, (0, 7), (6, 6))
    changed = (covered != pixels).any(dim=0)
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[:4, :4] = expected[4:8, 4:8] = True
    assert torch.equal(changed, expected)
    torch.testing.assert_close(covered[:, 5, 5], pixels.mean(dim=(1, 2)))
    rows = torch.rand(10, 12)  # of a tower that takes patches, the last one of padding
    assert (proof.cover(rows, (2,), (3, 3)) != rows).any(dim=1).nonzero().tolist() == [[2]]


def test_a_proof_compares_with_what_the_model_says_of_the_changed_picture(answerer):
    prompt = answerer.prepare(*turns_about(tiny_models.picture()), PLAIN)
    said, change = "abc", proof.Change(0, tuple(range(18)))
    found = answerer.prove(prompt, said, change)
    changed = answerer.prepare(*turns_about(tiny_models.picture()), PLAIN)
    changed.inputs["pixel_values"] = proof.cover(changed.inputs["pixel_values"][0], change.patches, (6, 6))[None]
    *_, then = answerer.reply(changed, PLAIN)
    assert found.answer == then.text
    words = (answerer.attend(asked, said) for asked in (prompt, changed))
    before, after = (np.prod([word.probability for word in one]) for one in words)
    assert (found.before, found.after) == (pytest.approx(before, rel=0.02), pytest.approx(after, rel=0.02))
    assert before != pytest.approx(after, rel=0.02)


@pytest.mark.parametrize(
    ("picture", "patches", "scope"), [(0, [], None), (1, [0], None), (0, [36], None), (0, ["0"], None), (0, [], 3)]
)
def test_what_cannot_be_changed_is_refused(picture, patches, scope):
    assert proof.checked_change(0, [35, 0], None, [36], 3) == proof.Change(0, (35, 0))
    assert proof.checked_change(0, [], 2, [36], 3) == proof.Change(scope=2)
    with pytest.raises(Refusal, match="no such part of the picture"):
        proof.checked_change(picture, patches, scope, [36], 3)


def test_reach_and_entropy_are_those_of_known_maps(maps):
    attentions = np.zeros((3, 4, 36))
    attentions[0, :, 0] = 1  # all look at the first patch,
    attentions[1] = 1 / 36  # or everywhere
    known = replace(maps, attentions=attentions)
    middles = np.array([(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)])
    np.testing.assert_allclose(measures.reach(known)[0], np.linalg.norm(middles - 1 / 12, axis=1))
    np.testing.assert_allclose(measures.entropy(known)[:, 0], [0, np.log2(36), 0], atol=1e-9)
    wide = replace(known, picture=Image.new("RGB", (48, 24)))
    np.testing.assert_allclose(
        measures.reach(wide)[0], np.linalg.norm((middles - 1 / 12) * (0.5, 1), axis=1)
    )  # in widths of the picture


def test_maps_are_files(maps):
    layer = layers.Layer(maps.weights, [np.stack([attention] * 2) for attention in maps.attentions])
    read = ["local", "regional", "global"], [(maps, [layer, layer])]
    whole = json.loads(measures.as_file("json", *read))
    arrays = np.load(io.BytesIO(measures.as_file("npz", *read)))
    assert whole["scopes"] == arrays["scopes"].tolist() == ["local", "regional", "global"]
    np.testing.assert_array_equal(arrays["attentions_0"], maps.attentions)
    np.testing.assert_allclose(whole["images"][0]["attentions"], maps.attentions, atol=6e-5)
    np.testing.assert_allclose(whole["images"][0]["reach"], arrays["reach_0"], atol=6e-5)
    assert arrays["head_scopes_0"].tolist() == whole["images"][0]["head_scopes"] == [0, 0, 1, 1, 2, 2]
    for name in ("reach", "entropy"):  # here, all heads of a scope look alike, in both layers
        np.testing.assert_allclose(arrays[f"head_{name}_0"][1, ::2], arrays[f"{name}_0"], rtol=1e-6)
    np.testing.assert_array_equal(arrays["layer_weights_0"], [maps.weights] * 2)


# --- Layers and heads -------------------------------------------------------------------------------------------


DEEP = {"num_hidden_layers": 2}
KINDS = [DEEP | {"scope_heads": [2, 1, 1]}, DEEP | {"projector_type": "ms_resampler_branches"}]


def about(answerer, *seeds):
    return answerer.prepare(*turns_about(*(tiny_models.picture(seed) for seed in seeds)), PLAIN)


@pytest.mark.parametrize("projector", KINDS, ids=["ms_resampler", "branches"])
def test_layers_are_those_of_the_model_and_heads_make_their_mean(projector):
    answerer, answered = space_server.make_answerer(projector=projector), {}
    for picture in (0, 1):
        maps, layers = answered[picture] = answerer.by_layer(about(answerer, 0, 1), picture)
        whole = answerer.look([tiny_models.picture(picture)], PLAIN)[0]
        last = layers[-1].within(maps, None, None)
        np.testing.assert_allclose(last.attentions, whole.attentions, atol=1e-5)
        np.testing.assert_allclose(last.weights, whole.weights, atol=1e-5)
        assert [[len(heads) for heads in layer.heads] for layer in layers] == answerer.scope_heads
        first = [heads.mean(axis=0) for heads in layers[0].heads]
        np.testing.assert_array_equal(layers[0].within(maps, 0, 1).attentions, [layers[0].heads[0][1], *first[1:]])
    assert len(answerer.scope_heads) == 2
    del answerer.model.model.projector.layers[1]
    (alone,) = answerer.by_layer(about(answerer, 1), 0)[1]
    for heads, kept in zip(alone.heads, answered[1][1][0].heads, strict=True):
        np.testing.assert_allclose(heads, kept, atol=1e-5)


@pytest.mark.parametrize("projector", KINDS, ids=["ms_resampler", "branches"])
def test_a_head_that_looks_nowhere_else_is_found_by_its_number(projector):
    answerer = space_server.make_answerer(projector=projector)
    scales = answerer.model.model.projector.layers[1].prior.log_scale
    scope, head, place = (0, 1, (0, 1)) if projector == KINDS[0] else (1, 3, (1, 3))
    before = measures.by_head(*answerer.by_layer(about(answerer, 0), 0))
    scales.data[place] = -6  # so narrow that it reads what is nearest
    maps, layers = answerer.by_layer(about(answerer, 0), 0)
    after = measures.by_head(maps, layers)
    changed = np.abs(after["head_entropy"] - before["head_entropy"]).max(axis=-1) > 0.1
    number = [one for one, its in enumerate(after["head_scopes"]) if its == scope][head]
    assert np.argwhere(changed).tolist() == [[1, number]]
    assert measures.entropy(layers[1].within(maps, scope, head))[scope].max() < 2.1  # of at most four alike


def test_words_attend_as_one_layer_and_head_does():
    answerer = space_server.make_answerer(text="gemma3_text", text_changes=SLIDING)
    prompt, answer = about(answerer, 0), "ab"
    (mean,), (second,) = answerer.attend(prompt, answer), answerer.attend(prompt, answer, 1)
    heads = [answerer.attend(prompt, answer, 1, head)[0].shares for head in range(4)]
    assert answerer.language_heads == (2, 4)
    np.testing.assert_allclose(second.shares, mean.shares, atol=1e-6)  # the only layer that sees everything
    np.testing.assert_allclose(np.mean(heads, axis=0), mean.shares, atol=1e-6)
    assert np.abs(heads[0] - heads[1]).max() > 1e-3
    with pytest.raises(Refusal, match="This layer of the language model keeps no attention weights"):
        answerer.attend(prompt, answer, 0)


@pytest.mark.parametrize(
    ("layer", "scope", "head"), [(2, None, None), (None, None, None), (0, 0, None), (0, 1, 2), (0, 3, 0), (0.0, 0, 0)]
)
def test_a_head_that_is_not_there_is_refused(layer, scope, head):
    told = [[3, 2, 1], [3, 2, 1]]
    layers.check_head(told, 1, 1, 1)
    layers.check_head(told, 0, None, None)
    with pytest.raises(Refusal, match="no such layer or head"):
        layers.check_head(told, layer, scope, head)


def test_the_page_gets_the_layer_that_it_asks_for(picture_file, monkeypatch):
    answerer, warned = space_server.make_answerer(projector=KINDS[0]), []
    monkeypatch.setattr(gr, "Warning", lambda message, title: warned.append(message))
    page = ask_page.AskPage(answerer, examples.examples_for("tiny"))
    history = [conversation.user_turn(QUESTION, [picture_file], []), conversation.assistant_turn("ab")]
    asked = {"number": 0, "request": 1, "visual_tokens": 9, "system_prompt": "", "tiles": None, "picture": 0}
    asked |= {"scope": 0, "head": 1}
    told = page.layer(history, types.SimpleNamespace(**asked, layer=0))["layer"]
    nine = settings.Settings(visual_tokens=9)
    maps, read = answerer.by_layer(answerer.prepare(*turns_about(tiny_models.picture()), nine), 0)
    steps, peaks = unpacked(told["steps"], "<u2").reshape(3, 9, 36), unpacked(told["peaks"], "<f4").reshape(3, 9, 1)
    np.testing.assert_allclose(steps / 65535 * peaks, read[0].within(maps, 0, 1).attentions, atol=1e-5)
    np.testing.assert_allclose(unpacked(told["weights"], "<f4"), read[0].weights.ravel())
    usual = answerer.usual(nine, page.examples).in_grid((3, 3))
    np.testing.assert_allclose(unpacked(told["usual"], "<f4"), usual[0].ravel(), rtol=1e-6)
    words = page.words(history, types.SimpleNamespace(**asked | {"head": 3}, layer=1))["words"]
    assert (words["layer"], words["head"], words["texts"]) == (1, 3, ["ab"])
    for wrong in ({"layer": 2}, {"layer": 0, "picture": 1}):
        assert "layer" not in page.layer(history, types.SimpleNamespace(**asked | wrong))
    assert "words" not in page.words(history, types.SimpleNamespace(**asked | {"head": 4}, layer=1))
    assert warned == [layers.UNKNOWN] * 3


# --- What is usual ----------------------------------------------------------------------------------------------


def test_the_usual_trust_is_the_mean_over_the_examples(answerer, monkeypatch):
    known = examples.examples_for("tiny")
    assert len(known.measured) == examples.MEASURED
    read = answerer.look(known.measured[:4], PLAIN) + answerer.look(known.measured[4:8], PLAIN)
    monkeypatch.setattr(examples, "MEASURED", 8)
    monkeypatch.setattr(answerer, "usually", {})
    answerer.forget()
    usual = answerer.usual(PLAIN, known).in_grid((2, 2))
    np.testing.assert_allclose(usual[-1], np.mean([one.weights for one in read], axis=0), atol=1e-5)
    assert list(answerer.readings) == []  # what visitors asked about is not pushed out
    monkeypatch.setattr(answerer, "measure", None)  # measured once
    again = answerer.usual(settings.Settings(visual_tokens=4), known)
    np.testing.assert_array_equal(again.in_grid((2, 2)), usual)
    np.testing.assert_allclose(again.in_grid((1, 4)), np.repeat(usual.mean(-1, keepdims=True), 4, -1), atol=1e-6)


def test_without_scopes_nothing_is_usual(without_scopes):
    assert without_scopes.usual(PLAIN, None).in_grid((2, 2)).shape == (1, 0, 4)
    assert without_scopes.scope_heads == []


def with_methods(answerer):
    """By method, the answerers that the Compare page offers beside a model."""
    return {one.reducers[0].name: one for one in answerer.with_reducers()}


@pytest.fixture(scope="module")
def every_patch():
    """A model of a token a patch, which can run every method but mustdrop and SparseVLM's."""
    return one_token_a_patch(text="llama", text_changes={"num_hidden_layers": 4})


def one_token_a_patch(**changes):
    """A model with LLaVA's MLP."""
    made = space_server.make_answerer(projector={"projector_type": "mlp", "visual_tokens": [6, 6]}, **changes)
    made.processor.visual_tokens = 36
    return made


def test_tokens_that_a_reducer_drops_are_told_and_only_while_it_answers(answerer):
    reduced = with_methods(answerer)["divprune"]
    assert reduced.budgets() == [1, 4]
    asked, one = turns_about(tiny_models.picture()), settings.Settings(visual_tokens=1)
    first, *_, last = reduced.reply(reduced.prepare(*asked, one), one)
    assert (len(first.maps[0].kept), first.maps[0].read, first.maps[0].token_grid) == (1, 1, (2, 2))
    assert answerer.model.config.reducer_config is None
    (word, *_) = reduced.attend(reduced.prepare(*asked, one), "abc")
    assert np.flatnonzero(word.shares).tolist() == first.maps[0].kept
    *_, whole = answerer.reply(answerer.prepare(*asked, PLAIN), PLAIN)
    assert last.text != whole.text
    assert answerer.look([tiny_models.picture()], PLAIN)[0].kept is None


BEFORE = ["fastervlm", "hired", "visionzip", "prumerge", "prumerge_plus", "divprune"]
IN_LAYERS = ["fastv", "pyramiddrop", "dart", "fitprune"]
MERGE = {"visionzip", "prumerge", "prumerge_plus"}


def test_every_method_that_a_model_can_run_is_offered(answerer, every_patch):
    assert list(with_methods(every_patch)) == [*BEFORE, *IN_LAYERS]
    assert list(with_methods(answerer)) == ["divprune", "fitprune"]  # two layers, and no token a patch
    sides = compare_page.ComparePage(every_patch, every_patch, examples.examples_for("tiny")).sides
    assert [side.name for side in sides[2:5]] == ["tiny with FasterVLM", "tiny with HiRED", "tiny with VisionZip"]


@pytest.mark.parametrize("kind", [*BEFORE, *IN_LAYERS])
def test_each_method_answers_as_the_model_does_with_it(kind, every_patch):
    side, wanted = with_methods(every_patch)[kind], settings.Settings(visual_tokens=9, max_new_tokens=8)
    prompt = side.prepare(*turns_about(tiny_models.picture()), wanted)
    first, *_, last = side.reply(prompt, wanted)
    model = every_patch.model.set_reducer(kind, keep=9)
    ids = model.generate(**prompt.inputs, max_new_tokens=8, do_sample=False)
    model.set_reducer(None)
    said = every_patch.processor.tokenizer.decode(ids[0, prompt.inputs["input_ids"].shape[1] :])
    assert last.text == said.strip()
    (maps,) = first.maps
    assert maps.read == (9 if kind in BEFORE else 36)
    assert (maps.kept is not None) == (kind in {"fastervlm", "hired", "divprune"})
    if maps.kept is not None:
        assert side.without_words(prompt, first.maps) is None
        assert all(np.flatnonzero(word.shares).tolist() == maps.kept for word in side.attend(prompt, last.text))
        return
    why = side.without_words(prompt, first.maps)
    assert ("9 tokens, merged" if kind in MERGE else "no attention in later layers") in why
    assert why.startswith(side.reducers[0].title)
    with pytest.raises(Refusal, match="no map of what the words attended to"):
        side.attend(prompt, last.text)


def test_a_models_own_reducer_is_told_like_one_that_is_compared(every_patch):
    every_patch.model.set_reducer("fastv", keep=9)
    prompt = every_patch.prepare(*turns_about(tiny_models.picture()), PLAIN)
    with pytest.raises(Refusal, match="FastV drops tokens between the language model's layers"):
        every_patch.attend(prompt, "abc")
    every_patch.model.set_reducer(None)


def test_the_page_compares_with_a_method_and_says_what_it_does(every_patch, picture_file, monkeypatch):
    model, used = every_patch.model, []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: used.append(model.reducer) or generate(**given))
    page = compare_page.ComparePage(every_patch, every_patch, examples.examples_for("tiny"))
    second = [side.name for side in page.sides].index("tiny with FastV")
    *_, shown = page.compare({"text": QUESTION, "files": [picture_file]}, second, False, 36, 9)
    _, one, one_view, other, other_view, _ = shown
    assert used == [None, next(own for own in page.sides[second].reducers if own.keep == 9)]
    assert one
    assert other
    assert one_view["words"]["texts"]
    assert one_view["without_words"] is None
    assert "words" not in other_view
    assert "later layers" in other_view["without_words"]
    _, about, answer, _, budget = page.switch(second)
    assert "What stays: The tokens that the last text token attends to most" in about
    assert (answer.value, answer.label) == ("", "B: tiny with FastV answers")
    assert budget.value == 16  # about half
    assert page.switch(1)[1] == ""


def test_what_a_method_is_called_and_does_is_shown_as_text(every_patch):
    hostile = types.SimpleNamespace(title="<b>", purpose="<img src=x onerror=alert(1)>")
    side = answering.Answerer(every_patch.model, every_patch.processor, "tiny", [hostile])
    assert compare_page.described(side) == ('<p class="quiet">What stays: &lt;img src=x onerror=alert(1)&gt;</p>')


def test_what_a_method_refuses_is_said():
    changes = {"num_hidden_layers": 4, "sliding_window": 40}  # less than picture and question
    model = one_token_a_patch(text="gemma3_text", text_changes=changes)
    side, wanted = with_methods(model)["fastv"], settings.Settings(visual_tokens=9)
    with pytest.raises(Refusal, match="at most 40 tokens here, the model's sliding window"):
        list(side.reply(side.prepare(*turns_about(tiny_models.picture()), wanted), wanted))
    with pytest.raises(Refusal, match="at least 1 visual token, got 0"), side.reducing(0):
        pass


def test_words_of_tokens_stand_where_the_tokens_are():
    words = [[("cat", 0.9)], [("dog", 0.8)]]
    assert answering.at_their_places(words, [1, 3], 4) == [[], words[0], [], words[1]]
    assert answering.at_their_places(words, None, 2) == words
    assert answering.at_their_places(words, None, 4) == []  # merged: they have no places
    assert answering.at_their_places([], [1, 3], 4) == []


def test_the_page_opens_with_an_answer_of_the_model_or_empty(answerer, monkeypatch):
    page = ask_page.AskPage(answerer, examples.examples_for("tiny"))
    (asked, answered), view = page.opening()
    assert conversation.text_of(asked) == "What is in the picture?"
    prompt = answerer.prepare(*conversation.topic([asked]), PLAIN)
    *_, said = answerer.reply(prompt, PLAIN)
    assert conversation.text_of(answered) == said.text
    assert " ".join(view["words"]["texts"]) == " ".join(said.text.split())
    assert view["verdict"]["right"] is False
    monkeypatch.setattr(answerer, "reply", lambda *asked: 1 / 0)
    assert page.opening() == ([], None)


def test_server_keeps_nothing(answerer):
    demo = app.build_demo(answerer)
    assert not any(block.stateful for block in demo.blocks.values() if hasattr(block, "stateful"))
    assert app.launch_options()["run_history"] is False


def test_the_app_imports_what_it_brings_and_what_it_requires():
    files = list(space_server.SPACE.glob("*.py"))
    requirements = (space_server.SPACE / "requirements.txt").read_text()
    required = {re.match(r"[\w-]+", line)[0] for line in requirements.splitlines()}
    assert len(files) > 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in named} - {one.stem for one in files} - {"spaces"}:
                assert name in sys.stdlib_module_names or name.replace("PIL", "pillow").replace("_", "-") in required, (
                    file.name,
                    name,
                )


@pytest.mark.parametrize(("cut", "sentence"), [(1, "not fully covered"), (None, "no file named model.safetensors")])
def test_a_model_that_cannot_be_loaded_is_named_in_a_sentence(cut, sentence, tmp_path, monkeypatch):
    model, processor = space_server.make_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-cut]) if cut else weights.unlink()
    monkeypatch.setenv("MODEL_ID", str(tmp_path))
    with pytest.raises(SystemExit) as exit:
        app.loaded("MODEL")
    assert str(exit.value).startswith(f"{tmp_path} cannot be loaded: ")
    assert sentence in str(exit.value)
    assert "\n" not in str(exit.value)


def test_an_image_token_that_a_visitor_types_is_text():
    answerer, picture = space_server.make_answerer(), tiny_models.picture()
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What does <image> mean?"}]
    turns = [{"role": "user", "content": content}, *turns_about(question="And <image>?")[0]]
    turns[1:1] = [{"role": "assistant", "content": [{"type": "text", "text": "An <image>."}]}]
    prompt = answerer.prepare(turns, [picture], settings.Settings(system_prompt="See <image>."))
    assert (prompt.inputs["input_ids"] == tiny_models.IMAGE).sum() == 4
    assert answerer.processor.tokenizer.decode(prompt.inputs["input_ids"][0]).count("<image>") == 4 + 4
