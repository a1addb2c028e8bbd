"""The Space as programs meet it: its endpoints, its limits, behind a proxy, alone in a folder, in a crowd."""

import gc
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import numpy as np
import pytest
import space_server
import tiny_models
import tiny_proxy
from gradio.state_holder import SessionState
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import HfApi
from PIL import Image

import app  # isort: skip (space_server made it importable)
import opaque
import settings

QUESTION = "What is this?"
PLAIN = settings.Settings()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answerer():
    return space_server.make_answerer()


@pytest.fixture(scope="module")
def address(answerer):
    with space_server.served(answerer) as address:
        yield address


@pytest.fixture
def client(address):
    with closing(Client(address, verbose=False, analytics_enabled=False)) as client:
        yield client


def expected_answer(answerer, picture, question, wanted=PLAIN):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    *_, last = answerer.reply(answerer.prepare([{"role": "user", "content": content}], [picture], wanted), wanted)
    return last.text


# --- The contract -----------------------------------------------------------------------------------------------


def test_endpoints_have_names_and_defaults(client):
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    parameters = {name: [one["parameter_name"] for one in api[name]["parameters"]] for name in api}
    sampling = ["system_prompt", "temperature", "top_p", "max_new_tokens"]
    assert parameters == {
        "/ask": ["images", "question", "visual_tokens", *sampling, "tiles"],
        "/scopes": ["images", "visual_tokens", "tiles"],
    }
    needed = {
        name: [one["parameter_name"] for one in api[name]["parameters"] if not one["parameter_has_default"]]
        for name in api
    }
    assert needed == {"/ask": ["images", "question", "visual_tokens"], "/scopes": ["images", "visual_tokens"]}


def test_ask_streams_json(client, answerer, picture_file):
    job = client.submit([handle_file(picture_file)], QUESTION, None, api_name="/ask")
    last, steps = job.result(timeout=60), job.outputs()
    assert steps[-1] == last
    assert len(steps) > 1
    assert last["answer"] == expected_answer(answerer, tiny_models.picture(), QUESTION) != ""
    assert (last["visual_tokens"], last["patches"]) == ([4], [36])
    assert 0 <= last["milliseconds_reading"] < last["milliseconds_to_first_token"] <= last["milliseconds"]


def test_ask_takes_several_pictures_and_settings(client, answerer, picture_file, tmp_path):
    tiny_models.picture(1).save(tmp_path / "other.png")
    files = [handle_file(picture_file), handle_file(str(tmp_path / "other.png"))]
    answer = client.predict(files, QUESTION, visual_tokens=9, max_new_tokens=5, api_name="/ask")
    assert answer["visual_tokens"] == [9, 9]
    assert len(answer["answer"]) <= 5


def test_scopes_gives_the_maps_in_json(client, answerer, picture_file):
    for budget in (None, 9):
        found = client.predict([handle_file(picture_file)], budget, api_name="/scopes")
        (maps,) = answerer.look([tiny_models.picture()], settings.Settings(visual_tokens=budget))
        (image,) = found["images"]
        assert found["scopes"] == ["local", "regional", "global"]
        assert (image["token_grid"], image["patch_grid"]) == (list(maps.token_grid), [6, 6])
        np.testing.assert_allclose(image["weights"], maps.weights, atol=6e-5)
        np.testing.assert_allclose(image["attentions"], maps.attentions, atol=6e-5)


def test_the_example_in_the_readme_runs(address, picture_file):
    readme = (space_server.SPACE / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict = {}
    exec(example.replace("http://127.0.0.1:7860", address).replace("scene.png", picture_file), names)
    names["client"].close()
    assert names["answer"]["answer"]
    assert len(names["scopes"]["images"][0]["weights"]) == 3


def test_errors_are_sentences(client, picture_file, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    broken, good = handle_file(str(tmp_path / "text.png")), handle_file(picture_file)
    for endpoint, arguments, sentence in [
        ("/ask", (None, QUESTION, None), "add a picture"),
        ("/ask", ([broken], QUESTION, None), "cannot be read"),
        ("/ask", ([good], "", None), "type a question"),
        ("/ask", ([good], QUESTION, 7), "7 visual tokens cannot be laid out"),
        ("/ask", ([good] * 5, QUESTION, None), "at most 4 pictures"),
        ("/scopes", ([good], 0), "number of visual tokens must be"),
        ("/scopes", (None, None), "add a picture"),
    ]:
        with pytest.raises(AppError, match=sentence) as error:
            client.predict(*arguments, api_name=endpoint)
        assert "Traceback" not in str(error.value)
        assert str(space_server.SPACE) not in str(error.value)


def test_one_image_needs_no_list_and_anything_else_is_refused(client, picture_file):
    one = handle_file(picture_file)
    assert client.predict(one, QUESTION, None, max_new_tokens=3, api_name="/ask")["visual_tokens"] == [4]
    assert len(client.predict(one, None, api_name="/scopes")["images"]) == 1
    for images in (picture_file, [picture_file], 3, {"path": picture_file}, [[one]]):
        for endpoint, arguments in (("/ask", (images, QUESTION, None)), ("/scopes", (images, None))):
            with pytest.raises(AppError, match="must be a list of files"):
                client.predict(*arguments, api_name=endpoint)


def test_nothing_is_fetched_from_elsewhere(client):
    with pytest.raises(AppError, match="send the picture itself"):
        client.predict([handle_file("http://127.0.0.1:9/picture.png")], QUESTION, None, api_name="/ask")


def test_a_typed_image_token_is_text(client, picture_file):
    asked = "What is <image>?"
    answer = client.predict([handle_file(picture_file)], asked, None, "See <image>.", max_new_tokens=3, api_name="/ask")
    assert answer["visual_tokens"] == [4]


def test_nobody_watches_visitors(address):
    assert [httpx.get(f"{address}/monitoring{page}").status_code for page in ("", "/summary", "/x")] == [403] * 3


def events_of(address, event, data):
    """What the queue tells a page about an event."""
    body = {"data": data, "fn_index": event["id"], "session_hash": f"visitor{event['id']}"}
    httpx.post(f"{address}/gradio_api/queue/join", json=body).raise_for_status()
    return httpx.get(f"{address}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}, timeout=60).text


def test_no_place_of_the_machine_is_told(address):
    file = io.BytesIO()
    tiny_models.picture().save(file, "PNG")
    uploaded = upload(address, file.getvalue())
    told = [httpx.get(f"{address}{page}").text for page in ("/", "/config", "/gradio_api/info", "/?view=api")]
    picture = {"path": uploaded.json()[0], "meta": {"_type": "gradio.FileData"}}
    lost, outside = picture | {"path": "lost.png"}, picture | {"path": "/uploads/../../etc/hosts"}
    asked = {"role": "user", "content": [{"type": "file", "file": picture}, {"type": "text", "text": QUESTION}]}
    answer, compare = (
        next(one for one in json.loads(told[1])["dependencies"] if (len(one["inputs"]), len(one["outputs"])) == wanted)
        for wanted in ((7, 2), (7, 6))
    )
    for sent in (picture, lost, outside):
        body = {"data": [sent, QUESTION, None, "", 0, 1, 8, 0]}
        told.append(httpx.post(f"{address}/gradio_api/run/ask", json=body, timeout=60).text)
    assert ['"answer"' in text for text in told[-3:]] == [True, False, False]
    talk = events_of(address, answer, [[asked], 4, "", 0, 1, 8, None])
    assert (picture["path"] in talk, '"success":true' in talk) == (True, True)
    told += [talk, events_of(address, compare, [{"text": QUESTION, "files": [picture]}, 9, False, 4, 4, None, None])]
    told += [uploaded.text, httpx.get(f"{address}/gradio_api/file=/uploads/lost.png").text]
    home, folder = os.path.expanduser("~") + "/", os.environ["GRADIO_TEMP_DIR"]
    for place in (str(space_server.SPACE), os.getcwd(), folder, tempfile.gettempdir() + "/", home):
        assert not [text for text in told if place in text], place


def test_an_upload_is_found_by_the_name_that_is_told(address):
    file = io.BytesIO()
    tiny_models.picture().save(file, "PNG")
    (path,) = upload(address, file.getvalue()).json()
    seen = httpx.get(f"{address}/gradio_api/file={path}")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(seen.content))), np.asarray(tiny_models.picture()))


def test_words_that_look_like_the_name_of_an_upload_stay_words():
    words = {"text": "/uploads/a", "path": "/uploads/b", "more": [{"path": "/uploadsc"}, {"path": 3}]}
    inside = opaque.inside(json.dumps(words).encode(), "/the/folder")
    assert json.loads(inside) == words | {"path": "/the/folder/b"}
    assert opaque.outside(inside, "/the/folder") == json.dumps(words).encode()
    assert opaque.inside(b'{"path": ', "/the/folder") == b'{"path": '


# --- Uploads ----------------------------------------------------------------------------------------------------


def upload(address, content, query=""):
    return httpx.post(f"{address}/gradio_api/upload{query}", files={"files": ("picture.png", content)}, timeout=60)


def test_a_picture_is_decoded_before_its_question_waits_and_is_small_then(address, monkeypatch):
    file, sizes = io.BytesIO(), []
    Image.effect_noise((60, 40), 90).resize((6000, 4000)).convert("RGB").save(file, "JPEG")
    (path,) = upload(address, file.getvalue()).json()
    with Image.open(path.replace(opaque.OUTSIDE, os.environ["GRADIO_TEMP_DIR"])) as image:
        assert image.size == (1254, 836)
    opened = Image.open

    def counted(*args, **options):
        image = opened(*args, **options)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(Image, "open", counted)
    asked = {"path": path, "meta": {"_type": "gradio.FileData"}}
    httpx.post(f"{address}/gradio_api/run/ask", json={"data": [asked, QUESTION, None, "", 0, 1, 3, 0]}, timeout=60)
    assert sizes == [(1254, 836)]


def test_the_page_is_told_at_once_what_cannot_be_used(address):
    assert "cannot be read" in upload(address, b"no picture", "?check").json()["refusal"]
    assert len(upload(address, b"no picture").json()) == 1  # programs are told when they ask


def test_an_upload_that_is_too_large_is_not_taken(address):
    """It is refused by its header, before any of it arrives."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        request = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {10**9}\r\n\r\n"
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_failure_inside_tells_nothing_of_the_machine(client, answerer, picture_file, monkeypatch):
    def fail(*_args):
        raise RuntimeError(f"{space_server.SPACE}/secret went wrong")

    monkeypatch.setattr(answerer, "look", fail)
    with pytest.raises(AppError, match="Something went wrong here; please try again") as error:
        client.predict([handle_file(picture_file)], None, api_name="/scopes")
    assert "secret" not in str(error.value)


def test_no_file_of_the_machine_is_read_for_a_stranger(address, picture_file):
    base = f"{address}/gradio_api"
    assert httpx.get(f"{base}/file={picture_file}").status_code == 403
    config = httpx.get(f"{address}/config").json()
    submit = next(event for event in config["dependencies"] if len(event["inputs"]) == 7 and len(event["outputs"]) == 2)
    stolen = {"type": "file", "file": {"path": picture_file, "meta": {"_type": "gradio.FileData"}}}
    asked = {"role": "user", "content": [stolen, {"type": "text", "text": QUESTION}]}
    body = {"data": [[asked], 4, "", 0, 1, 8, None], "fn_index": submit["id"], "session_hash": "stranger"}
    httpx.post(f"{base}/queue/join", json=body).raise_for_status()
    events = httpx.get(f"{base}/queue/data", params={"session_hash": "stranger"}, timeout=60).text
    done = [json.loads(line[5:]) for line in events.splitlines() if '"process_completed"' in line]
    assert [event["success"] for event in done] == [False]
    assert picture_file not in events


def test_an_app_that_ends_takes_no_picture_from_another():
    """Both of the same machine, with the same picture, which Gradio names by its content."""
    code = "import app, gradio.utils as utils; print(utils.get_upload_folder(), flush=True); input()"
    environment = {name: value for name, value in os.environ.items() if name != "GRADIO_TEMP_DIR"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    one, other = (
        subprocess.Popen([sys.executable, "-c", code], cwd=space_server.SPACE, env=environment, **pipes)
        for _ in range(2)
    )
    folders = [process.stdout.readline().strip() for process in (one, other)]
    assert folders[0] != folders[1]
    one.communicate("\n")
    assert [os.path.isdir(folder) for folder in folders] == [False, True]
    other.communicate("\n")


# --- Where it runs ----------------------------------------------------------------------------------------------


def test_the_api_works_behind_a_path_of_a_proxy(answerer, picture_file):
    with (
        tiny_proxy.proxy("/models/scopes") as (front, connect),
        space_server.served(answerer, root_path=front) as address,
    ):
        connect(address)
        with closing(Client(f"{front}/", verbose=False, analytics_enabled=False)) as client:
            assert client.predict([handle_file(picture_file)], QUESTION, None, api_name="/ask")["answer"]


@pytest.fixture
def model_folder(tmp_path):
    for part in space_server.make_model():
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@contextmanager
def app_alone(folder, **environment):
    """A client of the app in a new process: a copy of its folder, without our package, as a stranger would start it."""
    shutil.copytree(space_server.SPACE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    without_us = "import runpy, sys; sys.modules['ms_resampler'] = None; sys.path.insert(0, ''); "
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    process = subprocess.Popen(
        [sys.executable, "-c", without_us + "runpy.run_path('app.py', run_name='__main__')"],
        cwd=folder,
        env=inherited | {"GRADIO_SERVER_PORT": str(port)} | environment,
    )
    try:
        with closing(wait_for_client(f"http://127.0.0.1:{port}", process)) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def test_app_runs_alone_on_a_folder(tmp_path, model_folder, picture_file):
    model = str(model_folder)
    with app_alone(tmp_path / "space", MODEL_ID=model, COMPARE_MODEL_ID=model) as client:
        assert client.predict([handle_file(picture_file)], QUESTION, None, api_name="/ask")["answer"]


def test_app_runs_alone_on_a_repository(tmp_path, hub, model_folder, picture_file):
    api = HfApi(endpoint=hub.url, token=hub.add_user("ada", orgs={"acme": "write"}))
    api.create_repo("acme/tiny")
    api.upload_folder(repo_id="acme/tiny", folder_path=model_folder)
    at_hub = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    with app_alone(tmp_path / "space", MODEL_ID="acme/tiny", **at_hub) as client:
        assert client.predict([handle_file(picture_file)], QUESTION, None, api_name="/ask")["answer"]


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


# --- A crowd ----------------------------------------------------------------------------------------------------


def test_twenty_at_once_get_the_answers_to_their_own_questions(address, answerer, tmp_path):
    people, short = 20, settings.Settings(max_new_tokens=12)
    questions = [f"{chr(97 + person) * 9}?" for person in range(people)]
    images = [tiny_models.picture(person) for person in range(people)]
    expected = [expected_answer(answerer, images[0], question, short) for question in questions]
    assert len(set(expected)) > people / 2  # a mix-up would show
    together = threading.Barrier(people)

    def ask(person: int) -> tuple:
        images[person].save(tmp_path / f"{person}.png")
        file = handle_file(str(tmp_path / f"{person}.png"))
        with closing(Client(address, verbose=False, analytics_enabled=False)) as client:
            together.wait(timeout=120)
            answer = client.predict([first], questions[person], None, max_new_tokens=12, api_name="/ask")
            return answer["answer"], client.predict([file], None, api_name="/scopes")["images"][0]["weights"]

    images[0].save(tmp_path / "first.png")
    first = handle_file(str(tmp_path / "first.png"))
    with ThreadPoolExecutor(people) as crowd:
        answers, weights = zip(*crowd.map(ask, range(people)), strict=True)
    assert list(answers) == expected
    for image, found in zip(images, weights, strict=True):
        np.testing.assert_allclose(found, answerer.look([image], PLAIN)[0].weights, atol=6e-5)


def test_no_more_visitors_are_remembered_than_allowed(answerer, picture_file, monkeypatch):
    def remembered():
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) is SessionState]

    monkeypatch.setattr(app, "SESSIONS", 3)
    before = remembered()
    with space_server.served(answerer) as address:
        for _ in range(6):
            with closing(Client(address, verbose=False, analytics_enabled=False)) as client:
                assert client.predict([handle_file(picture_file)], QUESTION, None, max_new_tokens=3, api_name="/ask")
        assert len([one for one in remembered() if one not in before]) == 3
