"""The MS-Resampler Space: ask about a picture, and see what each scope looked at.

Settings, from the environment: MODEL_ID, a folder or a Hub repository; MODEL_REVISION; OPEN_BROWSER=1.
Gradio reads its own: GRADIO_SERVER_NAME, GRADIO_SERVER_PORT and so on.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
if Path(os.environ.get("MODEL_ID", "")).is_dir():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import gradio as gr
from answering import (
    MAX_FILE_MEGABYTES,
    MAX_NEW_TOKENS,
    MAX_QUESTION_CHARACTERS,
    Refusal,
    ScopeMaps,
    check_files,
    check_question,
    encode,
    load,
    look,
    open_picture,
    prepare,
    stream_answer,
)
from PIL import Image
from scope_view import PICKER_SCRIPT, empty_html, examples_html, header_html, overlays, view_html

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE / "examples"
EXAMPLES_SCRIPT = """
element.addEventListener('click', event => {
  const scene = event.target.closest('[data-scene]');
  if (scene) trigger('choose', {scene: Number(scene.dataset.scene)});
});
"""
# Gradio leaves the box, its Stop button and the pictures in the conversation nameless for screen readers.
NAMES_SCRIPT = """() => {
  const name = () => {
    document.querySelectorAll('#ask textarea').forEach(box => box.setAttribute('aria-label', 'Your question'));
    document.querySelectorAll('#ask .stop-button').forEach(button => button.setAttribute('aria-label', 'Stop'));
    document.querySelectorAll('#chat img[alt=""]').forEach(image => { image.alt = 'The picture asked about'; });
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}"""
log = logging.getLogger("ms_resampler.space")


class Space:
    """The event handlers of the page and of the API around one model; nothing is kept between calls."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor
        self.scenes = json.loads((EXAMPLES / "examples.json").read_text())["scenes"]

    def reply(self, history: list[dict]) -> Iterator[tuple[str, ScopeMaps]]:
        """The growing answer to the last question, each time with the maps of its picture."""
        conversation, picture = conversation_of(history)
        inputs = prepare(self.processor, self.model, conversation)
        features, maps = encode(self.model, self.processor, inputs, picture)
        for text in stream_answer(self.model, self.processor, inputs, features, MAX_NEW_TOKENS):
            yield text, maps

    def chat(self, message: dict, history: list[dict]) -> Iterator[tuple]:
        """A message typed in the page: yields the chat, the box to type in, and the scope view."""
        try:
            history = [*history, user_turn(message["text"], message["files"], history)]
        except Refusal as refusal:
            gr.Warning(str(refusal), title="Not yet")
            yield gr.skip(), gr.skip(), gr.skip()
            return
        yield [*history, assistant_turn("")], ask_box(answering=True), gr.skip()
        try:
            shown = None
            for text, maps in self.reply(history):
                view = gr.skip() if maps is shown else view_html(maps, maps.most_decided_token())
                yield [*history, assistant_turn(text)], gr.skip(), view
                shown = maps
        except Exception:
            log.exception("A question could not be answered")
            gr.Warning("Something went wrong here; please try again, or try another picture.", title="Sorry")
        yield gr.skip(), ask_box(), gr.skip()

    def choose(self, history: list[dict], event: gr.EventData) -> Iterator[tuple]:
        """An example picked in the page: its question is asked at once."""
        scene = self.scenes[event.scene]
        yield from self.chat({"text": scene["question"], "files": [str(EXAMPLES / scene["file"])]}, history)

    def pick(self, history: list[dict], event: gr.EventData) -> str:
        """The scope view with another token picked."""
        with errors_in_a_sentence():
            return view_html(look(self.model, self.processor, open_picture(last_picture(history))), event.token)

    def ask(self, image: str | None, question: str) -> Iterator[str]:
        """Streams the answer to a question about a picture."""
        with errors_in_a_sentence():
            history = [user_turn(question, [image] if image else [], [])]
            for text, _ in self.reply(history):
                yield text

    def scopes(self, image: str | None, token: int | None) -> tuple[dict, list[tuple[Image.Image, str]]]:
        """Fusion weights and overlays of a picture: for all visual tokens, or for the one with this number."""
        with errors_in_a_sentence():
            check_files([image] if image else [], has_earlier_picture=False)
            maps = look(self.model, self.processor, open_picture(image))
            count = maps.weights.shape[1]
            if token is not None and not 0 <= token < count:
                raise Refusal(f"There is no token {token}; they are numbered 0 to {count - 1}.")
            return summary(maps, token), list(zip(overlays(maps, token), maps.names, strict=True))


@contextmanager
def errors_in_a_sentence() -> Iterator[None]:
    """Whatever goes wrong reaches the caller as one sentence, without a trace."""
    try:
        yield
    except Refusal as refusal:
        raise gr.Error(str(refusal), title="Not yet", print_exception=False) from refusal
    except Exception as error:
        log.exception("A request failed")
        raise gr.Error("Something went wrong here; please try again.", print_exception=False) from error


def user_turn(text: str | None, files: list[str] | None, history: list[dict]) -> dict:
    """A question, with its picture if it brings one. Raises Refusal if it cannot be asked."""
    files = files or []
    check_files(files, has_earlier_picture=last_picture(history) is not None)
    question = check_question(text)
    pictures = [{"path": path, "alt_text": "The picture asked about"} for path in files if open_picture(path)]
    return {"role": "user", "content": [*pictures, question]}


def assistant_turn(text: str) -> dict:
    """An answer, or what there is of it."""
    return {"role": "assistant", "content": text or "…"}


def pictures_of(turn: dict) -> list[str]:
    """The paths of the pictures in a turn, as this app or Gradio writes them."""
    parts = [part.get("file", part) for part in turn["content"] if isinstance(part, dict)]
    return [part["path"] for part in parts if "path" in part]


def text_of(turn: dict) -> str:
    """The words of a turn."""
    content = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def last_picture(history: list[dict]) -> str | None:
    """The path of the picture that the conversation is about."""
    paths = [path for turn in history for path in pictures_of(turn)]
    return paths[-1] if paths else None


def conversation_of(history: list[dict]) -> tuple[list[dict], Image.Image]:
    """The turns since the last picture, as the processor takes them, and that picture."""
    start = max(number for number, turn in enumerate(history) if pictures_of(turn))
    picture = open_picture(pictures_of(history[start])[-1])
    turns = [{"role": turn["role"], "content": [{"type": "text", "text": text_of(turn)}]} for turn in history[start:]]
    turns[0]["content"].insert(0, {"type": "image", "image": picture})
    return turns, picture


def summary(maps: ScopeMaps, token: int | None) -> dict:
    """Numbers to go with the overlays."""
    weights = maps.weights.mean(axis=1) if token is None else maps.weights[:, token]
    return {
        "token_grid": list(maps.token_grid),
        "patch_grid": list(maps.patch_grid),
        "token": token,
        "weights": {name: round(float(weight), 4) for name, weight in zip(maps.names, weights, strict=True)},
    }


def ask_box(answering: bool = False) -> gr.MultimodalTextbox:
    """The box to type in: empty, with a Stop button in place of Send while an answer is written."""
    return gr.MultimodalTextbox(
        value=None,
        submit_btn=not answering,
        stop_btn=answering,
        label="Your question and picture",
        show_label=False,
        placeholder="Drop a picture here, and ask about it",
        sources=["upload"],
        file_types=["image"],
        file_count="single",
        max_plain_text_length=MAX_QUESTION_CHARACTERS,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        elem_id="ask",
    )


def build_demo(model: Any, processor: Any) -> gr.Blocks:
    """The page and the API around a model."""
    space = Space(model, processor)
    about = json.loads((EXAMPLES / "examples.json").read_text())
    names = list(model.config.projector_config.scope_names)
    with gr.Blocks(title="MS-Resampler", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as demo:
        gr.HTML(header_html(about["note"]), elem_id="header")
        with gr.Row(elem_id="page"):
            with gr.Column(scale=5, min_width=320, elem_id="talk"):
                chatbot = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=400,
                    layout="bubble",
                    render_markdown=False,
                    buttons=["copy"],
                    placeholder="Drop a picture below, or pick a scene.",
                    elem_id="chat",
                )
                box = ask_box()
                scenes = gr.HTML(examples_html(EXAMPLES, space.scenes), js_on_load=EXAMPLES_SCRIPT, elem_id="scenes")
            with gr.Column(scale=8, min_width=320, elem_id="look"):
                view = gr.HTML(empty_html(names), js_on_load=PICKER_SCRIPT, elem_id="view")
        connect(space, chatbot, box, scenes, view, empty_html(names))
        add_api(space)
    return demo.queue(max_size=32)


def connect(space: Space, chatbot, box, scenes, view, empty_view: str) -> None:
    """The events of the page."""
    page = {"outputs": [chatbot, box, view], "show_progress": "hidden", "api_visibility": "private"}
    one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
    asked = [
        box.submit(space.chat, [box, chatbot], **page, **one_at_a_time),
        scenes.choose(space.choose, [chatbot], **page, **one_at_a_time),
    ]
    box.stop(ask_box, None, box, cancels=asked, show_progress="hidden", api_visibility="private")
    # First the answer is cancelled, then all is emptied: its last words must not arrive afterwards.
    cleared = chatbot.clear(None, cancels=asked)
    cleared.then(lambda: ([], ask_box(), empty_view), None, **page)
    view.pick(space.pick, [chatbot], view, show_progress="hidden", api_visibility="private")


def add_api(space: Space) -> None:
    """The endpoints /ask and /scopes, for programs."""
    with gr.Row(visible=False):
        image = gr.File(label="image")
        question = gr.Textbox(label="question")
        token = gr.Number(label="token", value=None, precision=0)
        answer = gr.Textbox(label="answer")
        numbers = gr.JSON(label="weights")
        pictures = gr.Gallery(label="overlays", format="png")
        gr.Button().click(
            space.ask, [image, question], answer, api_name="ask", concurrency_id="model", concurrency_limit=1
        )
        gr.Button().click(space.scopes, [image, token], [numbers, pictures], api_name="scopes")


def launch_options() -> dict[str, Any]:
    """How the page is served: its looks, its limits, and nothing sent or remembered."""
    return {
        "theme": gr.themes.Base(
            primary_hue="neutral",
            neutral_hue="neutral",
            radius_size="md",
            # Gradio brings this font along; the semi-bold it brings has no Latin letters.
            font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css_paths": HERE / "style.css",
        "js": NAMES_SCRIPT,
        "allowed_paths": [str(EXAMPLES)],
        "max_file_size": MAX_FILE_MEGABYTES * 2**20,
        "show_error": False,
        "run_history": False,
        "footer_links": ["api", "settings"],
        "inbrowser": os.environ.get("OPEN_BROWSER") == "1",
    }


def main() -> None:
    """Loads the model that MODEL_ID names, and serves the page."""
    model_id = os.environ.get("MODEL_ID")
    if not model_id:
        raise SystemExit("Set MODEL_ID to a folder or a Hub repository with an MS-Resampler model.")
    model, processor = load(model_id, os.environ.get("MODEL_REVISION"))
    demo = build_demo(model, processor)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    print(f"MS-Resampler answers at {address} (Ctrl+C ends it)", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
