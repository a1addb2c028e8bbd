"""`ms-resampler demo`: serves the Space app around a model, and opens it in the browser."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from . import TINY
from .cli import model_or_embedded

PEER = str(Path(TINY).with_name("tiny_resampler"))  # a projector of one scope, trained in the embedded checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `demo`."""
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--compare",
        metavar="MODEL",
        help="a second folder or repository, to compare with "
        "(default, beside the embedded checkpoint: the same with one global scope)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")


def run(arguments: argparse.Namespace) -> int:
    """Runs the app until it ends or is interrupted: a program of its own, as on a Space."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The demo needs Gradio: pip install 'ms-resampler[demo]'.")
    check_port(arguments.host, arguments.port)
    app_file = find_app()
    with loadable_pair(arguments.model, arguments.compare) as (model, compared), ending_on_sigterm():
        app = subprocess.Popen([sys.executable, str(app_file)], env=environment(arguments, model, compared))
        try:
            return app.wait()
        finally:
            app.terminate()
            app.wait()


def find_app() -> Path:
    """app.py of the Space: inside this package's folder in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "space_app", package.parent / "space_app"):
        if (folder / "app.py").is_file():
            return folder / "app.py"
    raise FileNotFoundError("The demo's space_app folder is neither inside nor beside the installed package.")


def check_port(host: str, port: int | None) -> None:
    """Raises ValueError if the port that was asked for is taken; None is looked for by Gradio."""
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from error


@contextmanager
def loadable(model: str) -> Iterator[str]:
    """The model as a stranger can load it: a folder of weights without code gets the code, in a copy."""
    folder = Path(model)
    if not folder.is_dir() or (folder / "modeling_ms_resampler.py").is_file():
        yield str(folder.resolve()) if folder.is_dir() else model
        return
    from .hub_upload.staging import PROJECTOR, stage_checkpoint

    with tempfile.TemporaryDirectory(prefix="ms-resampler-") as place:
        staged = Path(place) / folder.resolve().name
        if (folder / PROJECTOR).is_file():
            stage_in_embedded(folder, staged)
        else:
            stage_checkpoint(folder, staged)
        yield str(staged)


@contextmanager
def loadable_pair(model: str | None, second: str | None) -> Iterator[tuple[str, str | None]]:
    """A model and the second one to compare it with, as strangers can load them; the embedded one brings its own."""
    second = second or (PEER if model is None else None)
    other = nullcontext() if second is None else loadable(model_or_embedded(second))
    with loadable(model_or_embedded(model)) as first, other as compared:
        yield first, compared


def stage_in_embedded(folder: Path, target: Path) -> None:
    """Stages the embedded checkpoint with the projector of a folder. Raises ValueError if it does not belong there."""
    from safetensors.torch import load_file, save_file

    from .hub_upload.staging import PROJECTOR, WEIGHTS, stage_checkpoint

    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (Path(TINY), folder))
    if any(ours[part] | theirs[part] != ours[part] | {"dtype": "float32"} for part in ("vision_config", "text_config")):
        raise ValueError(
            f"{folder} holds a projector alone, and not one for the embedded checkpoint: name a whole model."
        )
    stage_checkpoint(Path(TINY), target)
    shutil.copyfile(folder / "config.json", target / "config.json")
    tensors = {name: tensor for name, tensor in load_file(target / WEIGHTS).items() if "projector." not in name}
    save_file(tensors | load_file(folder / PROJECTOR), target / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """A polite request to end is an exit, so that the app ends, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(arguments: argparse.Namespace, model: str, compared: str | None = None) -> dict[str, str]:
    """The app's settings, on top of this process's environment."""
    settings = {
        "MODEL_ID": model,
        "MODEL_REVISION": arguments.revision,
        "COMPARE_MODEL_ID": compared,
        "GRADIO_SERVER_NAME": arguments.host,
        "GRADIO_SERVER_PORT": None if arguments.port is None else str(arguments.port),
        "OPEN_BROWSER": None if arguments.no_browser else "1",
    }
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return kept | {name: value for name, value in settings.items() if value is not None}
