"""The Space app around a small random model that talks: for the tests of its contract and of its page."""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import tiny_models

SPACE = Path(__file__).resolve().parent.parent / "space_app"
sys.path.insert(0, str(SPACE))  # the app is a folder of flat files, run as a script


def talkative(model):
    """Makes the model write words of few letters, all different ones, and never end by itself."""
    spoken = set(tiny_models.tiny_tokenizer()("abcde ")["input_ids"])
    model.generation_config.suppress_tokens = sorted(set(range(tiny_models.VOCABULARY)) - spoken)
    model.generation_config.no_repeat_ngram_size = 3
    return model


def make_model(*args, **kwargs):
    """A model of three scopes and 2 x 2 tokens over 6 x 6 patches, or as `tiny_model` takes it; and its processor."""
    return talkative(tiny_models.tiny_model(*args, **kwargs)), tiny_models.tiny_processor()


def make_answerer(*args, **kwargs):
    """The same, ready to be asked."""
    from answering import Answerer

    return Answerer(*make_model(*args, **kwargs), "tiny")


def slowed(answerer, seconds: float):
    """The same, with a rest before every token; `answerer.model.tokens_made` counts them."""
    model = answerer.model
    forward, model.tokens_made = model.forward, 0

    def slow_forward(*args, **kwargs):
        time.sleep(seconds)
        model.tokens_made += 1
        return forward(*args, **kwargs)

    model.forward = slow_forward
    return answerer


@contextmanager
def served(*answerers, opening=False, **options) -> Iterator[str]:
    """The address of the app, as long as the context lasts; with the example that it opens with, or empty."""
    import app
    import ask_page

    with nullcontext() if opening else patch.object(ask_page.AskPage, "opening", lambda page: ([], None)):
        demo = app.build_demo(*answerers)
    with socket.socket() as probe:  # Gradio's own search for a port leaves sockets open
        probe.bind(("127.0.0.1", 0))
        options.setdefault("server_port", probe.getsockname()[1])
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options(), **options)
    try:
        yield address.rstrip("/")
    finally:
        demo.close()
