"""The demo: the Space app around a model on this machine.

This module does not import transformers or torch, so that the app's process, which does, starts at once.
"""

import importlib.util
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

from .folders import (
    EMBEDDED,
    PROJECTOR,
    RECORD,
    WEIGHTS,
    find_app,
    model_or_embedded,
    read_config,
    remote_code_files,
    require_our_type,
)

PEER = EMBEDDED.with_name("tiny_resampler")  # a projector of one scope, trained in the embedded checkpoint
KINDS = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # suffixes of model files; neither code nor pickles


def serve(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    compare: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
) -> int:
    """Serves the page in a process of its own until it ends or is interrupted; returns its exit code.

    `model` is a folder or a Hub repository; None is the embedded checkpoint, compared with one of a single global
    scope. `compare` is a second model. The default port is the first free one from 7860.

    Raises ValueError if a model or the port cannot be used, ModuleNotFoundError if Gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("The demo needs Gradio: pip install 'ms-resampler[demo]'.", name="gradio")
    check_port(host, port)
    app_file = find_app()
    with loadable_pair(model, compare) as (first, second), ending_on_sigterm():
        settings = {
            "MODEL_ID": first,
            "MODEL_REVISION": revision,
            "COMPARE_MODEL_ID": second,
            "GRADIO_SERVER_NAME": host,
            "GRADIO_SERVER_PORT": None if port is None else str(port),
            "OPEN_BROWSER": "1" if browser else None,
        }
        app = subprocess.Popen([sys.executable, str(app_file)], env=environment(settings))
        try:
            return app.wait()
        finally:
            app.terminate()
            app.wait()


def environment(settings: dict[str, str | None]) -> dict[str, str]:
    """This process's environment with the app's settings; those that are None are removed."""
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return kept | {name: value for name, value in settings.items() if value is not None}


def check_port(host: str, port: int | None) -> None:
    """Raises ValueError if the port is taken or invalid; with None, Gradio finds a free one."""
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
    """A place from which the model loads without this package: a folder of links if its own has no code."""
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
        link_files(remote_code_files(), whole)
        yield str(whole)


def link_files(files: Iterable[Path], folder: Path) -> None:
    """Links files into a folder, or copies them if the system does not support links."""
    for file in filter(Path.is_file, files):
        try:
            (folder / file.name).symlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, folder / file.name)


@contextmanager
def loadable_pair(model: str | Path | None, second: str | Path | None) -> Iterator[tuple[str, str | None]]:
    """A model and the one to compare it with, both as `loadable`; the embedded model has a default second one."""
    second = second or (PEER if model is None else None)
    names = [model_or_embedded(name) for name in (model, second or model)]
    for name in names:
        if Path(name).is_dir():
            require_our_type(name, read_config(Path(name)))
    with loadable(names[0]) as first, nullcontext() if second is None else loadable(names[1]) as compared:
        yield first, compared


def put_into_embedded(folder: Path, target: Path) -> None:
    """Writes the embedded checkpoint with another projector. Raises ValueError if the projector does not fit."""
    ours, theirs = read_config(EMBEDDED), read_config(folder)
    if any(ours[part] | theirs[part] != ours[part] | {"dtype": "float32"} for part in ("vision_config", "text_config")):
        raise ValueError(
            f"{folder} holds a projector alone, and not one for the embedded checkpoint: name a whole model."
        )
    kept = [file for file in EMBEDDED.iterdir() if file.name not in ("config.json", RECORD, WEIGHTS)]
    link_files([*kept, folder / "config.json", folder / RECORD], target)
    tensors = {name: tensor for name, tensor in load_file(EMBEDDED / WEIGHTS).items() if "projector." not in name}
    try:
        projector = load_file(folder / PROJECTOR)
    except SafetensorError as error:
        raise ValueError(f"{folder / PROJECTOR} is not a whole file of weights ({error}): copy it again.") from error
    save_file(tensors | projector, target / WEIGHTS, metadata={"format": "pt"})


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into an exit, so that the app is terminated, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
