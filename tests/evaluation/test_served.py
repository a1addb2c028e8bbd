"""A model behind an OpenAI-compatible address: what is sent, and that `transformers serve` gives the same numbers."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from releases import pixels, put
from scene_suite import make_scene_suite, scene_model

from ms_resampler.evaluation import Options, evaluate
from ms_resampler.evaluation.answering import ServedModel


@contextmanager
def server(status=200, content="Yes. "):
    """An address that answers every request alike, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = json.dumps({"choices": [{"message": {"content": content}}], "error": "out of memory"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{service.server_port}/v1", asked
    finally:
        service.shutdown()
        service.server_close()


def test_requests_hold_the_pictures_the_text_and_the_budget(tmp_path):
    path = put(tmp_path / "a.png", pixels(1, "PNG"))
    with server() as (url, asked):
        model = ServedModel(url, "ours", budget=(2, 3), tiles=9)
        encoded = model.encode([path, pixels(2), base64.b64encode(pixels(3)).decode()])
        replies = model.answer(["What?", "Why?"], [encoded, []], max_new_tokens=7)
    assert replies == ["Yes.", "Yes."]
    path, body = max(asked, key=lambda request: len(str(request)))
    assert path == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("ours", 7, 0.0)
    assert body["chat_template_kwargs"] == {"visual_tokens": [[2, 3]] * 3, "tiles": 9}
    *images, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What?"}
    kinds, contents = zip(*(image["image_url"]["url"].split(";base64,") for image in images), strict=True)
    assert kinds == ("data:image/png", "data:image/jpeg", "data:image/jpeg")
    assert [base64.b64decode(c) for c in contents] == [pixels(1, "PNG"), pixels(2), pixels(3)]


def test_what_a_server_refuses_stops_the_run_with_its_words():
    with server(status=500) as (url, _), pytest.raises(ValueError, match=r"answered 500: .*out of memory"):
        ServedModel(url, "ours").answer(["What?"], [[]], 5)


def test_a_damaged_picture_is_found_before_it_is_sent():
    with pytest.raises(ValueError, match="cannot be read"):
        ServedModel("http://127.0.0.1:1", "ours").encode([b"no picture"])


@pytest.mark.slow
def test_transformers_serve_gives_the_numbers_of_the_loaded_model(tmp_path):
    suite, folder = make_scene_suite(tmp_path / "suite", 6), Path(scene_model(tmp_path / "model"))
    with served(folder) as url:
        prompts = json.loads((folder / "evaluation_prompts.json").read_text())
        assert prompts["scenes"] == "{question}"
        # An address does not carry prompts, so that both are asked with the suite's own.
        (folder / "evaluation_prompts.json").unlink()
        options = {"visual_tokens": (2, 3), "batch_size": 4}
        theirs = evaluate(str(folder), [suite], tmp_path / "served", Options(url=url, **options))
        ours = evaluate(str(folder), [suite], tmp_path / "loaded", Options(**options))
    replies = [
        [json.loads(line)["reply"] for line in (tmp_path / run / "scenes.jsonl").read_text().splitlines()]
        for run in ("served", "loaded")
    ]
    assert replies[0] == replies[1]
    assert theirs["tasks"]["scenes"]["numbers"] == ours["tasks"]["scenes"]["numbers"]


@contextmanager
def served(folder):
    """`transformers serve` with a model's folder, which gets the code that a stranger needs."""
    from ms_resampler import MSResamplerForConditionalGeneration, MSResamplerProcessor

    prompts = (folder / "evaluation_prompts.json").read_text()
    MSResamplerForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)
    MSResamplerProcessor.from_pretrained(folder).save_pretrained(folder)
    (folder / "evaluation_prompts.json").write_text(prompts)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--host", "127.0.0.1", "--port", port,
               "--device", "cpu", "--trust-remote-code", folder]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    log = folder.parent / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def is_up(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
