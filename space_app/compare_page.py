"""The Compare page: two budgets, or two models, answer the same question about the same pictures side by side."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from answering import Answerer
from ask_page import QUEUED, TAKE_PICTURES, UNSEEN, errors_in_a_sentence, warnings_in_a_sentence
from conversation import PENDING, text_of, topic, user_turn
from elements import (
    ask_box,
    box_update,
    budget_props,
    budget_slider,
    example_scenes,
    intake,
    scope_view,
    tiles_choice,
    view_props,
)
from examples import Examples
from known import note_for
from pictures import Refusal
from scope_view import view_value, words_value
from settings import Settings, checked


class ComparePage:
    """The page's events for two models, which may be the same."""

    def __init__(self, one: Answerer, other: Answerer, examples: Examples, note: str | None = None):
        self.sides, self.examples, self.note = [one, other], examples, note
        self.sides += one.with_reducers()

    def compare(
        self,
        message: dict,
        second: int,
        in_a_row: bool,
        one_budget: Any,
        other_budget: Any,
        one_tiles: Any = None,
        other_tiles: Any = None,
    ) -> Iterator[tuple]:
        """Yields the question, then answer and view of one side, then of the other; then, if wanted, the answers of the
        first with three budgets. Raises Refusal if it cannot.

        The other side is the model with the number `second`.
        """
        chosen = (one_budget, one_tiles), (other_budget, other_tiles)
        sides = self.sides[0], self.sides[second]
        with errors_in_a_sentence():
            asked = user_turn(message["text"], message["files"], [])
            conversation, example = topic([asked]), self.examples.number_of(asked)
            wanted = [checked(budget, "", 0, 1, Settings.max_new_tokens, tiles) for budget, tiles in chosen]
            prompts = [side.prepare(*conversation, settings) for side, settings in zip(sides, wanted, strict=True)]
        shown: list = ["", None, "", None, ""]
        yield message["text"], *shown
        with warnings_in_a_sentence():
            for number, (side, prompt, settings) in enumerate(zip(sides, prompts, wanted, strict=True)):
                usual = side.usual(settings, self.examples)
                for step in side.reply(prompt, settings):
                    shown[2 * number] = step.text or PENDING
                    if step.maps:
                        view = view_value(side.scopes, step, usual, settings, example=example)
                        view["without_words"] = side.without_words(prompt, step.maps)
                        note = note_for(side.known, text_of(asked), [maps.foreign for maps in step.maps])
                        if note:
                            view["note"] = {"text": note.sentence, "buttons": self.examples.suggestions(note)}
                            view["note"]["about"] = self.examples.picture_of(asked)
                        shown[2 * number + 1] = view
                    yield message["text"], *shown
                ended = {"verdict": self.examples.verdict(example, step.text)}
                with suppress(Refusal):  # of a language model without weights of attention, or what a reducer dropped
                    ended["words"] = words_value(side.attend(prompt, step.text)) if step.text else None
                shown[2 * number + 1] = view | ended
                yield message["text"], *shown
            for budget in three_budgets(sides[0]) if in_a_row else ():
                settings = replace(wanted[0], visual_tokens=budget)
                *_, step = sides[0].reply(sides[0].prepare(*conversation, settings), settings)
                shown[-1] += budget_row(budget, step.text, self.examples.verdict(example, step.text))
                yield message["text"], *shown

    def choose(self, event: gr.EventData, *chosen: Any) -> Iterator[tuple]:
        """Compares on an example at once; what is in the box stays there."""
        example = self.examples[event.scene]
        yield from self.compare({"text": example.question, "files": [example.path]}, *chosen)

    def take(self, event: gr.EventData, message: dict, *chosen: Any) -> Iterator[tuple]:
        """Compares on the question of a button beside a note: an example's, or one about the same picture, which is
        that of the example `about` or else in the box.
        """
        example = self.examples.suggested(event.value)
        if example:
            asked = {"text": example.question, "files": [example.path]}
        else:
            files = message["files"] if event.about is None else [self.examples[event.about].path]
            asked = {"text": str(event.value), "files": files}
        yield from self.compare(asked, *chosen)

    def switch(self, second: int) -> tuple[gr.MultimodalTextbox, str, gr.Textbox, gr.HTML, gr.HTML]:
        """Resets the box, what is said of the other side, and its answer, view and budget for another model.

        Ends a running comparison, which used the previous model.
        """
        side = self.sides[second]
        return (
            box_update(answering=False),
            described(side),
            gr.Textbox("", label=f"B: {side.name} answers"),
            gr.HTML(None, **view_props(side)),
            gr.HTML(self.second_budget(second), **budget_props(side)),
        )

    def second_budget(self, second: int) -> int:
        """The other side's initial budget: the model's default, or about half if both sides are the same model."""
        side = self.sides[second]
        same = side.model is self.sides[0].model
        return nearest(side.budgets(), side.trained_budget / 2) if same else side.trained_budget

    def build(self) -> None:
        """Builds the page and connects its events."""
        one, other, *_ = self.sides
        names = ("A", "B") if one is other else (f"A: {one.name}", f"B: {other.name}")
        choices = {label(side): number for number, side in enumerate(self.sides)}
        with gr.Row(elem_classes="page"):
            with gr.Column(scale=1, min_width=320):
                box = ask_box("compare-ask")
                taken = intake()
                second = gr.Radio(
                    sorted(choices.items(), key=lambda choice: choice[1] != 1),
                    value=1,
                    label=f"Compare {one.name} with",
                    info=self.note,
                    visible=len(choices) > 1,
                )
                about = gr.HTML("", elem_id="about-b", apply_default_css=False)
            with gr.Column(scale=1, min_width=320):
                scenes = example_scenes(self.examples, "Or compare on one of these", "compare-scenes")
        budgets, tiles = [], []
        with gr.Row(elem_classes="page"):
            for letter, side, budget in zip(
                "AB", (one, other), (one.trained_budget, self.second_budget(1)), strict=True
            ):
                with gr.Column(scale=1, min_width=320):
                    name = letter.lower()
                    budgets.append(budget_slider(side, budget, f"{letter}, visual tokens", f"budget-{name}"))
                    tiles.append(tiles_choice(f"{letter}, tiles", f"tiles-{name}"))
        chosen = [*budgets, *tiles]
        in_a_row = gr.Checkbox(False, label=f"Also ask A with {and_so_on(three_budgets(one))} visual tokens")
        question, answers, views = gr.Textbox(label="Question", interactive=False, elem_id="asked"), [], []
        with gr.Row(elem_classes="page"):  # a row of their own, so that the views begin at the same height
            for letter, name in zip("ab", names, strict=True):
                with gr.Column(scale=1, min_width=320):
                    answers.append(gr.Textbox(label=f"{name} answers", interactive=False, elem_id=f"answer-{letter}"))
        rows = gr.HTML("", elem_id="budgets-in-a-row", apply_default_css=False)
        with gr.Row(elem_classes="page"):
            for letter, side in zip("ab", (one, other), strict=True):
                with gr.Column(scale=1, min_width=320):
                    views.append(
                        scope_view(side, f"view-{letter}", f"Maps of {letter.upper()}", beside=f"#answer-{letter}")
                    )
        shown = [question, answers[0], views[0], answers[1], views[1], rows]
        page = {"outputs": shown, **QUEUED, "show_progress_on": answers}
        suggested = [view.suggested for view in views]
        for begins in (box.submit, scenes.choose, *suggested):  # before those that take their time
            begins(None, None, box, js="talk.answering", **UNSEEN)
        asked = [
            box.submit(self.compare, [box, second, in_a_row, *chosen], **page),
            scenes.choose(self.choose, [second, in_a_row, *chosen], **page),
            *(begun(self.take, [box, second, in_a_row, *chosen], **page) for begun in suggested),
        ]
        for compared in asked:
            compared.then(None, None, box, js="talk.ready", **UNSEEN)
        taken.sent(None, [taken, box], [taken, box], js=TAKE_PICTURES, **UNSEEN)
        # First cancels the comparison, so that its last words do not appear under another model's name.
        switched = second.change(None, cancels=asked)
        switched.then(self.switch, second, [box, about, answers[1], views[1], budgets[1]], **UNSEEN)
        box.stop(lambda: box_update(answering=False), None, box, cancels=asked, **UNSEEN)


def label(side: Answerer) -> str:
    """What a side is called among those to compare with: its method, if it has one."""
    return side.reducers[0].title if side.reducers else side.name


def described(side: Answerer) -> str:
    """What a side's method does, in HTML."""
    return f'<p class="quiet">What stays: {escape(side.reducers[0].purpose)}</p>' if side.reducers else ""


def nearest(numbers: list[int], wanted: float) -> int:
    """The number nearest to the one wanted."""
    return min(numbers, key=lambda number: abs(number - wanted))


def three_budgets(side: Answerer) -> list[int]:
    """A quarter of the default number of visual tokens, that number, and one for every patch."""
    budgets = side.budgets()
    return sorted({nearest(budgets, side.trained_budget / 4), side.trained_budget, budgets[-1]})


def and_so_on(numbers: list[int]) -> str:
    """[9, 36, 144] -> "9, 36 and 144"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def budget_row(budget: int, answer: str, verdict: dict[str, Any] | None) -> str:
    """An answer with its budget, in HTML."""
    mark = "" if verdict is None else " ✓" if verdict["right"] else " ✗"
    return f"<p><b>{budget} visual token{'s' * (budget > 1)}:</b> {escape(answer or PENDING)}{mark}</p>"
