"""docs/serving.md: `transformers serve` answers over HTTP as the model does at home, at the budget of each request."""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from tiny_models import asked
from transformers import AutoModelForImageTextToText, AutoProcessor

from ms_resampler_cli.main import main

PICTURE = Path(__file__).parent.parent / "space_app" / "examples" / "scene_15.png"
QUESTION = {"type": "text", "text": "What is in the picture?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    assert main(["export", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", folder, "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        while "Uvicorn running" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
        server.terminate()


@pytest.fixture
def ask(folder, address, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}

    def ask(*parts, **options) -> tuple[str, int]:
        """The answer, and the number of tokens of the prompt."""
        messages = [{"role": "user", "content": [picture, *parts]}]
        body = {"model": str(folder), "messages": messages, "temperature": 0, "max_tokens": 16, **options}
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            answer = json.load(reply)
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]

    return ask


@pytest.mark.slow
def test_requests_are_answered_as_the_model_answers_at_home(folder, ask):
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    for budget, options in (
        (36, {}),
        (9, {"visual_tokens": 9}),
        (6, {"processor_kwargs": {"visual_tokens": [[2, 3]]}}),
        (36, {"enable_thinking": False}),
    ):
        visual_tokens = {"visual_tokens": [(2, 3)] if budget == 6 else budget}
        inputs = asked(processor, QUESTION["text"], str(PICTURE), processor_kwargs=visual_tokens)
        with torch.inference_mode():
            new = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        said, length = ask(QUESTION, chat_template_kwargs=options)
        assert said == processor.decode(new, skip_special_tokens=True)
        assert length == inputs["input_ids"].shape[1]


@pytest.mark.slow
def test_requests_that_are_not_understood_are_refused(ask):
    typed, plain = (ask({"type": "text", "text": f"What does {word} mean?"})[1] for word in ("<image>", "<photo>"))
    assert abs(typed - plain) < 5  # letters, not the 36 tokens of a picture
    for parts, options in (
        ([{"type": "video_url", "video_url": {"url": "a.mp4"}}], {}),
        ([QUESTION], {"chat_template_kwargs": {"mosaic": 9}}),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(*parts, **options)
        assert caught.value.code >= 400
        caught.value.close()
