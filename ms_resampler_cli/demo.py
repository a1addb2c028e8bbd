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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ms_resampler.folders import EMBEDDED, PACKAGE, find_app, model_or_embedded

PEER = EMBEDDED.with_name("tiny_resampler")  # a projector of one scope, trained in the embedded checkpoint
WEIGHTS, PROJECTOR = "model.safetensors", "projector.safetensors"
KINDS = {
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
}  # of files that a model is loaded from: no code, no pickles


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


def check_port(host: str, port: int | None) -> None:
    """Raises ValueError if the port that was asked for is taken, or is none; None is looked for by Gradio."""
    if port is None:
        return
    if not 0 < port < 2**16:
        raise ValueError(f"A port is a number from 1 to 65535, and {port} is not.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from error


@contextmanager
def loadable(model: str) -> Iterator[str]:
    """The model as a stranger can load it: beside weights without code, in a folder of links, stands the code."""
    folder = Path(model)
    if not folder.is_dir() or (folder / "modeling_ms_resampler.py").is_file():
        yield str(folder.resolve()) if folder.is_dir() else model
        return
    with tempfile.TemporaryDirectory(prefix="ms-resampler-") as place:
        whole = Path(place) / folder.resolve().name
        whole.mkdir()
        if (folder / PROJECTOR).is_file():
            put_into_embedded(folder, whole)
        else:
            link_files((file for file in folder.iterdir() if file.suffix in KINDS), whole)
        link_files(PACKAGE.glob("*_ms_resampler.py"), whole)
        yield str(whole)


def link_files(files: Iterable[Path], folder: Path) -> None:
    """Puts links to files into a folder, or copies of them where the system makes no links."""
    for file in filter(Path.is_file, files):
        try:
            (folder / file.name).symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, folder / file.name)


@contextmanager
def loadable_pair(model: str | None, second: str | None) -> Iterator[tuple[str, str | None]]:
    """A model and the second one to compare it with, as strangers can load them; the embedded one brings its own."""
    second = second or (str(PEER) if model is None else None)
    other = nullcontext() if second is None else loadable(model_or_embedded(second))
    with loadable(model_or_embedded(model)) as first, other as compared:
        yield first, compared


def put_into_embedded(folder: Path, target: Path) -> None:
    """Makes the embedded checkpoint with the projector of a folder. Raises ValueError if it does not belong there."""
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (EMBEDDED, folder))
    if any(ours[part] | theirs[part] != ours[part] | {"dtype": "float32"} for part in ("vision_config", "text_config")):
        raise ValueError(
            f"{folder} holds a projector alone, and not one for the embedded checkpoint: name a whole model."
        )
    kept = [file for file in EMBEDDED.iterdir() if file.name not in ("config.json", WEIGHTS)]
    link_files([*kept, folder / "config.json"], target)
    tensors = {name: tensor for name, tensor in load_file(EMBEDDED / WEIGHTS).items() if "projector." not in name}
    try:
        projector = load_file(folder / PROJECTOR)
    except SafetensorError as error:
        raise ValueError(f"{folder / PROJECTOR} is not a whole file of weights ({error}): copy it again.") from error
    save_file(tensors | projector, target / WEIGHTS, metadata={"format": "pt"})


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
