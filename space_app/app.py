"""The MS-Resampler Space: ask about a picture, and see what each scope looked at.

Settings, from the environment: MODEL_ID, a folder or a Hub repository; MODEL_REVISION; COMPARE_MODEL_ID, a second
model to compare it with; COMPARE_MODEL_REVISION; OPEN_BROWSER=1. Gradio reads its own: GRADIO_SERVER_NAME,
GRADIO_ROOT_PATH and so on.
"""

import atexit
import gc
import inspect
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
if all(Path(os.environ.get(name) or ".").is_dir() for name in ("MODEL_ID", "COMPARE_MODEL_ID")):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
if not os.environ.get("GRADIO_TEMP_DIR"):
    # A folder for this process only: Gradio names uploads by their content and deletes its own when it ends, so that
    # two apps with one folder would delete each other's pictures.
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="ms-resampler-uploads-")
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(os.environ["GRADIO_TEMP_DIR"])  # as Gradio tells it, to be hidden

gc.disable()  # garbage collection would take a quarter of the start-up time


def file_of(thing: Any, getfile: Callable[[Any], str] = inspect.getfile) -> str:
    """As inspect.getfile, but fails for Gradio's components, so that Gradio writes no type stubs for them."""
    if getattr(thing, "__module__", "").startswith("gradio."):
        raise OSError("no stub")
    return getfile(thing)


with patch("inspect.getfile", file_of):  # half of the time of importing Gradio
    import gradio as gr

from answering import Answerer, load
from api import Api
from ask_page import UNSEEN, AskPage
from compare_page import ComparePage
from elements import HERE, PAGE_SCRIPT, header
from examples import EXAMPLES, examples_for, read_examples
from opaque import Opaque
from pictures import MAX_FILE_MEGABYTES, Refusal
from safetensors import SafetensorError
from starlette.middleware import Middleware
from uploads import UPLOAD_SECONDS, Uploads

gc.freeze()  # nor will it be
gc.enable()

QUEUE_LENGTH = 32
DELETE_CACHE = (60, UPLOAD_SECONDS)  # seconds between checks of the uploads, and from their last use to their end
SESSIONS = 64  # visitors whose state Gradio keeps, about a megabyte each


async def fetch_nothing(url: str, cache_dir: str) -> str:
    """In place of Gradio's download of any address that a program names, of any size."""
    raise Refusal("Please send the picture itself: this server fetches none from elsewhere.")


gr.processing_utils.async_ssrf_protected_download = fetch_nothing


def build_demo(answerer: Answerer, other: Answerer | None = None) -> gr.Blocks:
    """The pages and the API for a model, and a second one to compare it with."""
    notes, examples = read_examples()["models"], examples_for(answerer.name)
    with gr.Blocks(title="MS-Resampler", analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE) as demo:
        header(notes.get(answerer.name, ""))
        with gr.Tab("Ask and see"):
            ask = AskPage(answerer, examples)
            # As an event, because Gradio would keep the picture of a fixed value among the uploads, which are deleted.
            opened = demo.load(ask.open, None, ask.build(), queue=False, **UNSEEN)
            opened.then(None, None, None, js="talk.opened", **UNSEEN)
        with gr.Tab("Compare"):
            second = other or answerer
            compared = ComparePage(answerer, second, examples, notes.get(second.name))
            compared.build()
        Api(answerer).build()
        for side in {*compared.sides}:
            demo.unload(side.forget)
    return demo.queue(max_size=QUEUE_LENGTH)


def launch_options() -> dict[str, Any]:
    """How the page is served: theme, limits, and no analytics."""
    return {
        "theme": gr.themes.Base(
            primary_hue="neutral",
            neutral_hue="neutral",
            radius_size="md",
            # Gradio includes this font; its semi-bold has no Latin letters.
            font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ).set(  # readable greys: Gradio's are too pale on white
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_400",
            input_placeholder_color="*neutral_500",
            input_placeholder_color_dark="*neutral_400",
        ),
        "css_paths": HERE / "style.css",
        "js": PAGE_SCRIPT,
        "allowed_paths": [str(EXAMPLES)],
        "max_file_size": MAX_FILE_MEGABYTES * 2**20,
        "show_error": False,
        "enable_monitoring": False,
        "app_kwargs": {"middleware": [Middleware(Opaque), Middleware(Uploads)]},
        "run_history": False,
        "state_session_capacity": SESSIONS,
        "footer_links": ["api", "settings"],
        "inbrowser": os.environ.get("OPEN_BROWSER") == "1",
    }


def loaded(name: str) -> Answerer | None:
    """The model that the variables NAME_ID and NAME_REVISION specify, if set. Exits if it cannot be loaded."""
    model_id = os.environ.get(f"{name}_ID")
    if not model_id:
        return None
    try:
        return load(model_id, os.environ.get(f"{name}_REVISION"))
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(f"{model_id} cannot be loaded: {' '.join(str(error).split())}") from error


def main() -> None:
    """Loads the model of MODEL_ID and the one to compare with, and serves the page."""
    answerer = loaded("MODEL")
    if answerer is None:
        raise SystemExit("Set MODEL_ID to a folder or a Hub repository with an MS-Resampler model.")
    demo = build_demo(answerer, loaded("COMPARE_MODEL"))
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that uploads are deleted then, too
    print(f"MS-Resampler answers at {address} (Ctrl+C ends it)", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
