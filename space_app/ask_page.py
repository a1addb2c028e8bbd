"""The Ask page: the chat on one side, what each scope looked at on the other."""

import base64
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from html import escape
from typing import Any

import gradio as gr
from answering import Answerer, Prompt
from conversation import (
    answers_in,
    as_sent,
    assistant_turn,
    last_question,
    pictures_of,
    said_in,
    text_of,
    topic,
    turn_of,
    user_turn,
)
from elements import (
    ask_box,
    box_update,
    budget_slider,
    example_scenes,
    intake,
    scope_view,
    settings_panel,
    tiles_choice,
)
from examples import Examples
from known import note_for
from layers import UNKNOWN, check_head, check_language_head, is_one_of
from measures import FILES, as_file
from pictures import Refusal
from proof import checked_change
from scope_view import layer_value, view_value, words_value
from settings import Settings, checked
from tour import tour

log = logging.getLogger("ms_resampler.space")
SORRY = "Something went wrong here; please try again, or try another picture."
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
UNSEEN = {"show_progress": "hidden", "api_visibility": "private"}
# Waiting visitors see their place in the queue.
QUEUED = {"show_progress": "minimal", "api_visibility": "private", **ONE_AT_A_TIME}
# A photograph goes into the box without a server call, as do pictures that were sent.
TAKE_PHOTOGRAPH = """(photograph, box) => photograph
  ? [null, {text: box?.text || '', files: [...(box?.files || []), photograph]}] : [photograph, box]"""
TAKE_PICTURES = "(sent, box) => [null, {text: box?.text || '', files: [...(box?.files || []), ...(sent || [])]}]"


@contextmanager
def warnings_in_a_sentence() -> Iterator[None]:
    """Shows any error as one sentence, without a traceback; the page does not change."""
    try:
        with errors_in_a_sentence():
            yield
    except Refusal as refusal:
        gr.Warning(refusal.message, title=refusal.title)


@contextmanager
def errors_in_a_sentence(shown: Callable[[str], str] = escape) -> Iterator[None]:
    """Turns any error into one sentence, without a traceback, in the form in which it is shown: on the page, HTML."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, Refusal)
        if not known:
            log.exception("A request failed")
        raise Refusal(shown(error.message) if known else SORRY, "Not yet" if known else "Sorry") from error


class AskPage:
    """The page's events for one model; the server keeps no state of the page between calls.

    A question is first in the chat, then checked, and then waits for the model.
    """

    def __init__(self, answerer: Answerer, examples: Examples):
        self.answerer, self.examples, self.first = answerer, examples, ([], None)

    def opening(self) -> tuple[list[dict], dict[str, Any] | None]:
        """The chat and the view that the page opens with: an example, answered now; empty if that fails."""
        example = self.examples.opening
        asked = turn_of("user", example.question, [example.path])
        with suppress(Refusal), errors_in_a_sentence():
            prompt = self.answerer.prepare(*topic([asked]), Settings())
            list(self.answerer.reply(prompt, Settings(max_new_tokens=1)))  # a model's first answer takes longer
            self.answerer.forget()
            steps = list(self.answerer.reply(prompt, Settings()))
            number, answer = self.examples.number_of(asked), steps[-1].text
            usual = self.answerer.usual(Settings(), self.examples)
            view = view_value(self.answerer.scopes, steps[0], usual, Settings(), 0, number) | {"opening": True}
            view["verdict"] = self.examples.verdict(number, answer)
            with suppress(Refusal):
                view["words"] = words_value(self.answerer.attend(prompt, answer))
            return [asked, assistant_turn(answer)], view
        return [], None

    def open(self, request: gr.Request) -> tuple:
        """What a visitor sees first, if there is anything; a link that names another example asks about that one."""
        linked = "example" in request.query_params
        return (gr.skip(), gr.skip()) if linked or not self.first[0] else self.first

    def choose(self, history: list[dict], event: gr.EventData) -> tuple[list[dict], gr.MultimodalTextbox]:
        """Puts the question of an example into the chat; what is in the box stays there."""
        example = self.examples[event.scene]
        asked = turn_of("user", example.question, [example.path])
        return [*as_sent(history), asked], box_update(answering=True)

    def take(self, history: list[dict], event: gr.EventData) -> tuple[list[dict], gr.MultimodalTextbox]:
        """Puts the question of a button beside a note into the chat: an example's, by its number, has its picture."""
        example = self.examples.suggested(event.value)
        asked = turn_of("user", example.question, [example.path]) if example else turn_of("user", str(event.value))
        return [*as_sent(history), asked], box_update(answering=True)

    def retry(self, history: list[dict]) -> tuple[list[dict], gr.MultimodalTextbox]:
        """Takes the last answer out of the chat."""
        return as_sent(history[: last_question(history) + 1]), box_update(answering=True)

    def check(self, history: list[dict], *settings: Any) -> None:
        """Raises Refusal if the last question cannot be asked."""
        with errors_in_a_sentence():
            *earlier, asked = history
            topic([*earlier, user_turn(text_of(asked), pictures_of(asked), earlier)])
            checked(*settings)

    def answer(self, history: list[dict], *settings: Any) -> Iterator[tuple]:
        """Yields the chat and the scope view while the last question is answered. Raises Refusal if it cannot be.

        The view is yielded with every word, because a slow page shows only the latest of several values and would miss
        a single one; only changes are sent.
        """
        history, view, note, buttons = as_sent(history), gr.skip(), "", []
        with errors_in_a_sentence():
            wanted = checked(*settings)
            steps = self.answerer.reply(self.answerer.prepare(*topic(history), wanted), wanted)
        yield [*history, assistant_turn("")], view
        example = self.examples.number_of(history[-1])
        with warnings_in_a_sentence():
            usual = self.answerer.usual(wanted, self.examples)  # may take a second, and words would come meanwhile
            for step in steps:
                if step.maps:
                    number = len(answers_in(history))
                    view = view_value(self.answerer.scopes, step, usual, wanted, number, example)
                    foreign = [maps.foreign for maps in step.maps]
                    told = note_for(self.answerer.known, text_of(history[-1]), foreign)
                    note, buttons = told.sentence if told else "", self.examples.suggestions(told)
                yield [*history, assistant_turn(step.text, note)], view
            verdict = self.examples.verdict(example, step.text)
            ended = assistant_turn(step.text, note, buttons)
            yield [*history, ended], {**view, "verdict": verdict} if verdict else view

    def asked_before(self, history: list[dict], event: gr.EventData) -> tuple[Prompt, str]:
        """The prompt of an answer that the view shows, and the answer. Raises Refusal if it is not there."""
        wanted = checked(event.visual_tokens, event.system_prompt, 0, 1, 1, event.tiles)
        places = answers_in(history)
        if event.number >= len(places):
            raise Refusal("That answer was taken back; please ask again.")
        place = places[event.number]
        if not said_in(history[place]):
            raise Refusal("That answer has no words; please ask again.")
        return self.answerer.prepare(*topic(history[:place]), wanted), text_of(history[place])

    def words(self, history: list[dict], event: gr.EventData) -> dict[str, Any]:
        """The words of an answer, requested by the view: what they attended to in a layer and by a head, if named."""
        with warnings_in_a_sentence():
            asked = self.asked_before(history, event)
            check_language_head(self.answerer.language_heads, event.layer, event.head)
            words = words_value(self.answerer.attend(*asked, event.layer, event.head))
            return reply_to(event, words=words | {"layer": event.layer, "head": event.head})
        return reply_to(event)

    def layer(self, history: list[dict], event: gr.EventData) -> dict[str, Any]:
        """The maps of a picture in a layer, in one scope by one of its heads, if named."""
        with warnings_in_a_sentence():
            prompt, _ = self.asked_before(history, event)
            check_head(self.answerer.scope_heads, event.layer, event.scope, event.head)
            if not is_one_of(event.picture, len(prompt.pictures)):
                raise Refusal(UNKNOWN)
            maps, layers = self.answerer.by_layer(prompt, event.picture)
            shown = layers[event.layer].within(maps, event.scope, event.head)
            usual = self.answerer.usual(checked(event.visual_tokens, "", 0, 1, 1), self.examples)
            chosen = {name: getattr(event, name) for name in ("picture", "layer", "scope", "head")}
            return reply_to(event, layer={**chosen, **layer_value(shown, usual.for_tokens(maps)[event.layer])})
        return reply_to(event)

    def prove(self, history: list[dict], event: gr.EventData) -> dict[str, Any]:
        """Asks again without a part of the picture or a scope that the view names."""
        with warnings_in_a_sentence():
            prompt, answer = self.asked_before(history, event)
            patches = [maps.patches for maps in self.answerer.encode(prompt)[2]]
            change = checked_change(event.picture, event.patches, event.scope, patches, len(self.answerer.scopes))
            proof = self.answerer.prove(prompt, answer, change)
            return reply_to(event, proof={**asdict(change), **asdict(proof), "said": answer})
        return reply_to(event)

    def download(self, history: list[dict], event: gr.EventData) -> dict[str, Any]:
        """The maps of an answer as a file."""
        with warnings_in_a_sentence():
            kind = FILES[FILES.index(event.kind)]
            prompt, _ = self.asked_before(history, event)
            read = [self.answerer.by_layer(prompt, number) for number in range(len(prompt.pictures))]
            content = base64.b64encode(as_file(kind, self.answerer.scopes, read)).decode()
            return reply_to(event, file={"name": f"scopes.{kind}", "content": content})
        return reply_to(event)

    def build(self) -> list[gr.components.Component]:
        """Builds the page and connects its events; returns what `open` fills."""
        self.first = self.opening()
        with gr.Row(elem_classes="page"):
            with gr.Column(scale=6, min_width=320, elem_classes="talk"):
                chatbot = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    height=360,
                    layout="bubble",
                    render_markdown=False,
                    latex_delimiters=[],
                    buttons=["copy"],
                    allow_file_downloads=False,
                    placeholder="Drop a picture below, or pick a scene.",
                    elem_id="chat",
                )
                box = ask_box("ask")
                taken = intake()
                budget = budget_slider(self.answerer, self.answerer.trained_budget, "Visual tokens a picture", "budget")
                tiles = tiles_choice("Tiles", "tiles")
                scenes = example_scenes(self.examples, "Or ask about one of these", "scenes")
                with gr.Row(elem_classes="drawers"):
                    settings = [budget, *settings_panel(), tiles]
                    with gr.Accordion("Camera", open=False, elem_id="camera"):
                        camera = gr.Image(sources=["webcam"], type="filepath", label="Camera", show_label=False)
            with gr.Column(scale=7, min_width=320, elem_classes="look"):
                tour(self.answerer)
                view = scope_view(self.answerer, "view", "Maps", beside="#chat", asks=True)
        camera.change(None, [camera, box], [camera, box], js=TAKE_PHOTOGRAPH, **UNSEEN)
        taken.sent(None, [taken, box], [taken, box], js=TAKE_PICTURES, **UNSEEN)
        self.connect(chatbot, box, scenes, view, settings)
        return [chatbot, view]

    def connect(self, chatbot, box, scenes, view, settings: list) -> None:
        """The events of the page; `talk` is in page.js."""
        talk, page = [chatbot, box], {"outputs": [chatbot, view], **QUEUED, "show_progress_on": chatbot}
        asked = [
            box.submit(None, [box, chatbot], talk, js="(box, history) => talk.ask(box, history)", **UNSEEN),
            scenes.choose(self.choose, chatbot, talk, **UNSEEN),
            chatbot.retry(self.retry, chatbot, talk, **UNSEEN),
            chatbot.option_select(self.take, chatbot, talk, **UNSEEN),
        ]
        answers = []
        for question in asked:
            check = question.success(self.check, [chatbot, *settings], **UNSEEN)
            answer = check.success(self.answer, [chatbot, *settings], **page)
            answer.success(None, None, box, js="talk.ready", **UNSEEN)
            for failed in (check.failure, answer.failure):
                failed(None, talk, talk, js="(history, box) => talk.end(history, box)", **UNSEEN)
            answers.append(answer)
        chatbot.undo(None, talk, talk, js="(history, box) => talk.takeBack(history, box)", **UNSEEN)
        box.stop(lambda: box_update(answering=False), None, box, cancels=answers, **UNSEEN)
        # First cancels the answer, then clears everything, so that its last words do not arrive afterwards.
        cleared = chatbot.clear(None, cancels=answers)
        cleared.then(self.answerer.forget, **UNSEEN)
        cleared.then(lambda: ([], box_update(answering=False, value=None), None), None, [chatbot, box, view], **UNSEEN)
        requests = {
            view.words: self.words,
            view.layer: self.layer,
            view.proof: self.prove,
            view.download: self.download,
        }
        for event, answer_it in requests.items():
            event(answer_it, [chatbot], view, **UNSEEN, **ONE_AT_A_TIME)


def reply_to(event: gr.EventData, **content: Any) -> dict[str, Any]:
    """What the view gets for a request about an answer; the request's number, as an equal value would not be sent."""
    return {"number": event.number, "request": event.request, **content}
