"""The page on which one asks: the chat on one side, what each scope saw on the other."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from answering import Answerer
from conversation import answers_in, assistant_turn, last_question, pictures_of, text_of, topic, user_turn
from elements import EXAMPLES, ask_box, box_update, budget_slider, example_scenes, scope_view, settings_panel
from pictures import Refusal
from scope_view import view_value, words_value
from settings import checked

log = logging.getLogger("ms_resampler.space")
SORRY = "Something went wrong here; please try again, or try another picture."
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
UNSEEN = {"show_progress": "hidden", "api_visibility": "private"}
# Who waits sees the place in the queue.
QUEUED = {"show_progress": "minimal", "api_visibility": "private", **ONE_AT_A_TIME}
# A photograph goes into the box without a look at the server.
TAKE_PHOTOGRAPH = """(photograph, box) => photograph
  ? [null, {text: box?.text || '', files: [...(box?.files || []), photograph]}] : [photograph, box]"""


@contextmanager
def warnings_in_a_sentence() -> Iterator[None]:
    """Whatever goes wrong is shown beside the page as one sentence, without a trace; the page stays as it is."""
    try:
        yield
    except Refusal as refusal:
        gr.Warning(refusal.message, title=refusal.title)
    except Exception:
        log.exception("A question could not be answered")
        gr.Warning(SORRY, title="Sorry")


class AskPage:
    """The events of the page around one model; the page itself keeps nothing between calls."""

    def __init__(self, answerer: Answerer, scenes: list[dict[str, Any]]):
        self.answerer, self.scenes = answerer, scenes

    def submit(self, message: dict, history: list[dict], *settings: Any) -> Iterator[tuple]:
        """A question typed in the page."""
        yield from self.answer(lambda: [*history, user_turn(message["text"], message["files"], history)], settings)

    def choose(self, history: list[dict], event: gr.EventData, *settings: Any) -> Iterator[tuple]:
        """An example picked in the page: its question is asked at once."""
        scene = self.scenes[event.scene]
        yield from self.submit(
            {"text": scene["question"], "files": [str(EXAMPLES / scene["file"])]}, history, *settings
        )

    def retry(self, history: list[dict], *settings: Any) -> Iterator[tuple]:
        """The last question is asked again, and its answer is taken back."""
        yield from self.answer(lambda: history[: last_question(history) + 1], settings)

    def take_back(self, history: list[dict]) -> tuple[list[dict], gr.MultimodalTextbox]:
        """The last question goes back into the box with its pictures, to be asked in other words."""
        place = last_question(history)
        message = {"text": text_of(history[place]), "files": pictures_of(history[place])}
        return history[:place], box_update(answering=False, value=message)

    def answer(self, asked: Callable[[], list[dict]], settings: tuple) -> Iterator[tuple]:
        """Yields the chat, the box to type in and the scope view, as the answer to the last question grows.

        What cannot be asked leaves all three as they are. The view comes again with every word, though only what
        changes is sent: a slow page shows the latest of several values, and would miss one that comes once.
        """
        prompt = None
        with warnings_in_a_sentence():
            history, wanted = asked(), checked(*settings)
            prompt = self.answerer.prepare(*topic(history), wanted)
        if prompt is None:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        view = gr.skip()
        yield [*history, assistant_turn("")], box_update(answering=True, value=None), view
        with warnings_in_a_sentence():
            for step in self.answerer.reply(prompt, wanted):
                if step.maps:
                    number = len(answers_in(history))
                    view = view_value(self.answerer.scopes, step, wanted, number)
                yield [*history, assistant_turn(step.text)], gr.skip(), view
        yield gr.skip(), box_update(answering=False), view

    def words(self, history: list[dict], event: gr.EventData) -> dict[str, Any]:
        """The words of an answer, for the view that asks for them."""
        number = event.number
        with warnings_in_a_sentence():
            wanted = checked(event.visual_tokens, event.system_prompt, 0, 1, 1)
            places = answers_in(history)
            if number >= len(places):
                raise Refusal("That answer was taken back; ask again to play its words.")
            place = places[number]
            prompt = self.answerer.prepare(*topic(history[:place]), wanted)
            words = self.answerer.attend(prompt, text_of(history[place]))
            return words_value(words, number)
        return {"number": number, "words": []}

    def build(self) -> None:
        """Lays the page out and connects it."""
        with gr.Row(elem_classes="page"):
            with gr.Column(scale=6, min_width=320, elem_classes="talk"):
                chatbot = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=360,
                    layout="bubble",
                    render_markdown=False,
                    buttons=["copy"],
                    allow_file_downloads=False,
                    placeholder="Drop a picture below, or pick a scene.",
                    elem_id="chat",
                )
                box = ask_box("ask")
                budget = budget_slider(self.answerer, self.answerer.trained_budget, "Visual tokens a picture", "budget")
                scenes = example_scenes(self.scenes, "Or ask about one of these", "scenes")
                with gr.Row(elem_classes="drawers"):
                    settings = [budget, *settings_panel()]
                    with gr.Accordion("Camera", open=False, elem_id="camera"):
                        camera = gr.Image(sources=["webcam"], type="filepath", label="Camera", show_label=False)
            with gr.Column(scale=7, min_width=320, elem_classes="look"):
                view = scope_view(self.answerer, "view", "Maps", plays=True)
        camera.change(None, [camera, box], [camera, box], js=TAKE_PHOTOGRAPH, **UNSEEN)
        self.connect(chatbot, box, scenes, view, settings)

    def connect(self, chatbot, box, scenes, view, settings: list) -> None:
        """The events of the page."""
        page = {"outputs": [chatbot, box, view], **QUEUED, "show_progress_on": chatbot}
        asked = [
            box.submit(self.submit, [box, chatbot, *settings], **page),
            scenes.choose(self.choose, [chatbot, *settings], **page),
            chatbot.retry(self.retry, [chatbot, *settings], **page),
        ]
        chatbot.undo(self.take_back, chatbot, [chatbot, box], **UNSEEN)
        box.stop(lambda: box_update(answering=False), None, box, cancels=asked, **UNSEEN)
        # First the answer is cancelled, then all is emptied: its last words must not arrive afterwards.
        cleared = chatbot.clear(None, cancels=asked)
        cleared.then(self.answerer.forget, **UNSEEN)
        cleared.then(lambda: ([], box_update(answering=False, value=None), None), None, [chatbot, box, view], **UNSEEN)
        view.words(self.words, [chatbot], view, **UNSEEN, **ONE_AT_A_TIME)
