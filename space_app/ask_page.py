"""The Ask page: the chat on one side, what each scope looked at on the other."""

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
# Waiting visitors see their place in the queue.
QUEUED = {"show_progress": "minimal", "api_visibility": "private", **ONE_AT_A_TIME}
# A photograph goes into the box without a server call.
TAKE_PHOTOGRAPH = """(photograph, box) => photograph
  ? [null, {text: box?.text || '', files: [...(box?.files || []), photograph]}] : [photograph, box]"""


@contextmanager
def warnings_in_a_sentence() -> Iterator[None]:
    """Shows any error as one sentence, without a traceback; the page does not change."""
    try:
        yield
    except Refusal as refusal:
        gr.Warning(refusal.message, title=refusal.title)
    except Exception:
        log.exception("A question could not be answered")
        gr.Warning(SORRY, title="Sorry")


class AskPage:
    """The page's events for one model; the server keeps no state of the page between calls."""

    def __init__(self, answerer: Answerer, scenes: list[dict[str, Any]]):
        self.answerer, self.scenes = answerer, scenes

    def submit(self, message: dict, history: list[dict], *settings: Any) -> Iterator[tuple]:
        """Answers a question typed in the page."""
        yield from self.answer(lambda: [*history, user_turn(message["text"], message["files"], history)], settings)

    def choose(self, history: list[dict], event: gr.EventData, *settings: Any) -> Iterator[tuple]:
        """Asks the question of an example at once."""
        scene = self.scenes[event.scene]
        yield from self.submit(
            {"text": scene["question"], "files": [str(EXAMPLES / scene["file"])]}, history, *settings
        )

    def retry(self, history: list[dict], *settings: Any) -> Iterator[tuple]:
        """Asks the last question again, and replaces its answer."""
        yield from self.answer(lambda: history[: last_question(history) + 1], settings)

    def take_back(self, history: list[dict]) -> tuple[list[dict], gr.MultimodalTextbox]:
        """Puts the last question with its pictures back into the box, to be edited."""
        place = last_question(history)
        message = {"text": text_of(history[place]), "files": pictures_of(history[place])}
        return history[:place], box_update(answering=False, value=message)

    def answer(self, asked: Callable[[], list[dict]], settings: tuple) -> Iterator[tuple]:
        """Yields the chat, the input box and the scope view while the last question is answered.

        A refused question leaves all three unchanged. The view is yielded with every word, because a slow page shows
        only the latest of several values and would miss a single one; only changes are sent.
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
        """The words of an answer, requested by the view."""
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
        """Builds the page and connects its events."""
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
        # First cancels the answer, then clears everything, so that its last words do not arrive afterwards.
        cleared = chatbot.clear(None, cancels=asked)
        cleared.then(self.answerer.forget, **UNSEEN)
        cleared.then(lambda: ([], box_update(answering=False, value=None), None), None, [chatbot, box, view], **UNSEEN)
        view.words(self.words, [chatbot], view, **UNSEEN, **ONE_AT_A_TIME)
