import os
import shutil
import socket
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import space_server
import tiny_models
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import answering  # isort: skip (space_server made it importable)
import app
import scope_view

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def model_and_processor():
    return space_server.make_model()


@pytest.fixture(scope="module")
def client(model_and_processor):
    with space_server.served(*model_and_processor) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        yield client
        client.close()


@pytest.fixture
def picture_file(tmp_path):
    path = tmp_path / "picture.png"
    tiny_models.picture().save(path)
    return str(path)


@pytest.fixture
def maps(model_and_processor):
    return answering.look(*model_and_processor, tiny_models.picture())


# --- The parts, without a server -------------------------------------------------------------------------------


def test_maps_are_what_the_model_says(model_and_processor, maps):
    model, processor = model_and_processor
    pixels = processor.image_processor([tiny_models.picture()], return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixels, output_scopes=True)
    np.testing.assert_allclose(maps.weights, features.scope_weights[0].detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(maps.attentions, features.scope_attentions[0].detach().numpy(), atol=1e-6)
    assert maps.names == ["local", "regional", "global"]
    assert (maps.token_grid, maps.patch_grid, maps.picture.size) == ((2, 2), (6, 6), (24, 24))


def test_seen_picture_is_the_crop_that_the_processor_made(maps):
    height, width = 30, 40  # the short side becomes 24, then the middle 24 x 24 are kept
    whole = tiny_models.picture(size=(height, width)).resize((32, 24), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(np.asarray(maps.picture), np.asarray(whole)[:, 4:28], atol=2)


def test_streamed_answer_is_the_one_that_pixels_give(model_and_processor):
    model, processor = model_and_processor
    conversation = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny_models.picture()}, {"type": "text", "text": QUESTION}],
        }
    ]
    inputs = answering.prepare(processor, model, conversation)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    features, _ = answering.encode(model, processor, inputs, tiny_models.picture())
    pieces = list(answering.stream_answer(model, processor, inputs, features, 12))
    assert pieces[-1] == expected != ""
    assert all(after.startswith(before) for before, after in pairwise(pieces))


def test_closing_the_stream_stops_the_generation():
    model, processor = space_server.make_model()
    space_server.slowed(model, 0.02)
    space = app.Space(model, processor)
    path = str(space_server.SPACE / "examples" / space.scenes[0]["file"])
    stream = space.reply([app.user_turn(QUESTION, [path], [])])
    next(stream)
    stream.close()
    time.sleep(0.1)  # the token that was under way
    made = model.tokens_made
    time.sleep(0.2)
    assert model.tokens_made == made < answering.MAX_NEW_TOKENS


def test_a_failing_generation_raises_where_the_answer_is_read(model_and_processor, picture_file):
    model, processor = model_and_processor
    inputs = answering.prepare(processor, model, [{"role": "user", "content": [{"type": "text", "text": "?"}]}])
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(answering.stream_answer(model, processor, inputs, None, -1))


def test_conversation_starts_with_the_last_picture(picture_file):
    history = [
        {"role": "user", "content": [{"path": "an older one"}, "Which?"]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": [{"type": "file", "file": {"path": picture_file}}, "And?"]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        {"role": "user", "content": ["Why?"]},
    ]
    turns, picture = app.conversation_of(history)
    assert picture.size == tiny_models.picture().size
    assert [part["type"] for part in turns[0]["content"]] == ["image", "text"]
    assert [turn["content"][-1]["text"] for turn in turns] == ["And?", "This.", "Why?"]


@pytest.mark.parametrize(
    ("text", "files", "sentence"),
    [
        (QUESTION, [], "add a picture"),
        (QUESTION, ["a.png", "b.png"], "one picture at a time; these are 2"),
        ("  ", ["picture"], "type a question"),
        ("x" * 501, ["picture"], "501 characters"),
        (QUESTION, ["text"], "cannot be read"),
        (QUESTION, ["missing"], "cannot be read"),
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
    with pytest.raises(answering.Refusal, match=sentence) as refusal:
        app.user_turn(text, [paths.get(name, name) for name in files], [])
    assert str(refusal.value).count(".") == 1


def test_a_later_question_needs_no_picture(picture_file):
    first = app.user_turn(QUESTION, [picture_file], [])
    assert app.user_turn("And now?", [], [first]) == {"role": "user", "content": ["And now?"]}


def test_transparent_picture_stands_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert answering.over_white(clear).getpixel((0, 0)) == (255, 255, 255)


def test_overlay_covers_the_place_with_attention_most():
    heat = np.zeros((4, 4))
    heat[0, 3] = 0.2
    picture = Image.new("RGB", (40, 40), "white")
    covered = np.asarray(scope_view.overlay(picture, heat, "#0072B2")).astype(int)
    colour = np.array([0x00, 0x72, 0xB2])
    distance = np.abs(covered - colour).sum(-1)
    row, column = np.unravel_index(distance.argmin(), distance.shape)
    assert row < 10
    assert column >= 30
    assert len(set(covered[30, 10])) == 1  # grey, where nothing was looked at


def test_view_says_what_the_maps_say(maps):
    html = scope_view.view_html(maps, 3)
    assert html.count("data-token=") == 4
    assert html.count('aria-pressed="true"') == 1
    assert html.count("<img") == html.count('alt="') == 7  # the picture, and three scopes twice
    for name, mean, one in zip(maps.names, maps.weights.mean(1), maps.weights[:, 3], strict=True):
        assert f"{name}</b>" in html
        assert f"trust {scope_view.percent(mean)}" in html
        assert f"trust {scope_view.percent(one)}" in html


def test_example_scenes_are_there(model_and_processor):
    for scene in app.Space(*model_and_processor).scenes:
        assert answering.check_question(scene["question"])
        assert answering.open_picture(app.EXAMPLES / scene["file"]).size == (96, 96)
        assert scene["alt"].startswith("A drawn scene")


def test_server_keeps_nothing(model_and_processor):
    demo = app.build_demo(*model_and_processor)
    assert not any(block.stateful for block in demo.blocks.values() if hasattr(block, "stateful"))
    assert app.launch_options()["run_history"] is False


# --- The contract of the API -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_endpoints_have_names(client):
    api = client.view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == {"/ask", "/scopes"}
    names = [parameter["parameter_name"] for parameter in api["named_endpoints"]["/ask"]["parameters"]]
    assert names == ["image", "question"]


@pytest.mark.slow
def test_ask_streams(client, picture_file):
    job = client.submit(handle_file(picture_file), QUESTION, api_name="/ask")
    answer, growing = job.result(timeout=60), job.outputs()
    assert growing[-1] == answer != ""
    assert len(growing) > 1


@pytest.mark.slow
def test_scopes_gives_numbers_and_pictures(client, picture_file, maps):
    for token in (None, 3):
        numbers, pictures = client.predict(handle_file(picture_file), token, api_name="/scopes")
        weights = maps.weights.mean(1) if token is None else maps.weights[:, token]
        np.testing.assert_allclose(list(numbers["weights"].values()), weights, atol=1e-3)
        assert (numbers["token_grid"], numbers["patch_grid"], numbers["token"]) == ([2, 2], [6, 6], token)
        assert [picture["caption"] for picture in pictures] == maps.names
        with Image.open(pictures[0]["image"]) as overlay:
            assert overlay.size == (scope_view.SHOWN_PIXELS,) * 2


@pytest.mark.slow
def test_errors_are_sentences(client, picture_file, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    broken = handle_file(str(tmp_path / "text.png"))
    for arguments, endpoint, sentence in [
        ((None, QUESTION), "/ask", "add a picture"),
        ((broken, QUESTION), "/ask", "cannot be read"),
        ((handle_file(picture_file), ""), "/ask", "type a question"),
        ((handle_file(picture_file), 4), "/scopes", "There is no token 4"),
    ]:
        with pytest.raises(AppError, match=sentence) as error:
            client.predict(*arguments, api_name=endpoint)
        assert "Traceback" not in str(error.value)


# --- Alone, as on a Space ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_app_runs_alone_on_a_folder(tmp_path, picture_file):
    model, processor = space_server.make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    shutil.copytree(space_server.SPACE, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MODEL_ID": str(tmp_path / "model"), "GRADIO_SERVER_PORT": str(port)}
    without_us = "import runpy, sys; sys.modules['ms_resampler'] = None; sys.path.insert(0, ''); "
    process = subprocess.Popen(
        [sys.executable, "-c", without_us + "runpy.run_path('app.py', run_name='__main__')"],
        cwd=tmp_path / "space",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings,
    )
    try:
        client = wait_for_client(f"http://127.0.0.1:{port}", process)
        assert client.predict(handle_file(picture_file), QUESTION, api_name="/ask")
        client.close()
    finally:
        process.terminate()
        process.wait()


def wait_for_client(address: str, process: subprocess.Popen) -> Client:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=1).close()
        except OSError:
            time.sleep(0.3)
        else:
            return Client(address, verbose=False, analytics_enabled=False)
    raise AssertionError("the app did not start")
