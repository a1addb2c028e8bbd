"""`ms-resampler demo`: serves the Space app around a model, and opens it in the browser."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from .cli import model_or_embedded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `demo`."""
    parser.add_argument("--model", help="folder or Hub repository (default: the embedded checkpoint)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this computer only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")


def run(arguments: argparse.Namespace) -> NoReturn:
    """Becomes the app: a program of its own, as on a Space, that no code of this package has prepared."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The demo needs Gradio: pip install 'ms-resampler[demo]'.")
    os.execve(sys.executable, [sys.executable, str(find_app())], environment(arguments))


def find_app() -> Path:
    """app.py of the Space: beside this package's folder in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "space_app", package / "space_app"):
        if (folder / "app.py").is_file():
            return folder / "app.py"
    raise FileNotFoundError("The demo's space_app folder is neither beside nor inside the installed package.")


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The app's settings; a folder is named in full, for the app must not take it for a repository."""
    model = model_or_embedded(arguments.model)
    settings = {
        "MODEL_ID": str(Path(model).resolve()) if Path(model).is_dir() else model,
        "MODEL_REVISION": arguments.revision,
        "GRADIO_SERVER_NAME": arguments.host,
        "GRADIO_SERVER_PORT": None if arguments.port is None else str(arguments.port),
        "OPEN_BROWSER": None if arguments.no_browser else "1",
    }
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return kept | {name: value for name, value in settings.items() if value is not None}
