"""What the Space says about foreign pictures and words, and that it measures as the package does."""

import json

import gradio as gr
import pytest
import space_server
import tiny_models
import torch
from safetensors.torch import load_file

from ms_resampler.demo import PEER, loadable
from ms_resampler.folders import KNOWN, RECORD
from ms_resampler.tiny import known as measured

import ask_page  # isort: skip (space_server made it importable)
import conversation
import elements
import examples
import known

WORDS = frozenset({"what", "is", "the", "of", "in", "picture", "colour", "show"})
ENTRY = {
    "distance": 2.0,
    "words": " ".join(sorted(WORDS)),
    "unknown_share": 0.2,
    "questions": ["What is in the picture?"],
}
SCORES = [{"visual_tokens": count, "questions": 9, "mean": 0.5, "low": 0.25, "high": 0.75} for count in (4, 1)]


def knowing(**changes):
    words = {"tensors": {}, **ENTRY, "words": WORDS, **changes}
    return known.Known(**words)


@pytest.fixture
def page():
    answerer = space_server.make_answerer()
    answerer.known = knowing()
    return ask_page.AskPage(answerer, examples.examples_for("tiny"))


def test_pictures_are_as_far_as_the_package_measured(tmp_path):
    trained, states = torch.randn(30, 8), torch.randn(20, 4, 3, 3) * torch.linspace(0.2, 3, 20)[:, None, None, None]
    measured.fit_pictures(trained, tmp_path / KNOWN)
    features = torch.cat([states.mean(dim=(2, 3)), states.std(dim=(2, 3))], dim=-1)
    tensors = load_file(tmp_path / KNOWN)
    away = measured.distances(features, tensors)
    middle = sorted(away)[9] + 1e-3
    said = [knowing(tensors=tensors, distance=middle).is_foreign(one) for one in states]
    assert said == [one > middle for one in away]
    assert 0 < sum(said) < 20


@pytest.mark.parametrize(
    "question",
    ["What is the capital of France?", "Tell me: what's shown in the picture?", "Hm. What is it of?", "?", "Isn't it?"],
)
def test_words_are_as_foreign_as_the_package_measured(question):
    (unknown, count), most = measured.unknown_words(question, WORDS), ENTRY["unknown_share"]
    assert knowing().foreign_words(question) == (unknown if len(unknown) > most * count else [])


@pytest.mark.parametrize(
    ("foreign", "words", "note"),
    [
        ([False], [], ""),
        ([True], [], "This picture is unlike those that the model was trained on, so the answer may be wrong."),
        ([True, False], ["why"], "One of these pictures is unlike those that the model was trained on, so the answer "
         "may be wrong. The model has not learned the word “why”."),
        ([False], ["capital", "France"], "The model has not learned the words “capital” and “France”."),
        ([False], ["a", "b", "c", "d"], "The model has not learned the words “a”, “b” and “c”."),
    ],
)  # fmt: skip
def test_a_note_says_what_is_foreign(foreign, words, note):
    assert known.note_on(foreign, words) == note


def test_a_checkpoint_tells_what_it_knows_and_another_tells_nothing(tmp_path):
    assert known.read_record(str(tmp_path), None) == (None, [])
    (tmp_path / RECORD).write_text(json.dumps({"known_inputs": ENTRY, "budget_scores": SCORES}))
    assert known.read_record(str(tmp_path), None) == (None, SCORES)
    measured.fit_pictures(torch.randn(9, 2), tmp_path / KNOWN)
    told, scores = known.read_record(str(tmp_path), None)
    assert (told.distance, told.words, told.questions) == (2.0, WORDS, ENTRY["questions"])
    assert told.tensors["features"].shape == (9, 2)
    assert scores == SCORES


def test_another_projector_in_the_embedded_checkpoint_has_its_own_record():
    with loadable(str(PEER)) as folder:
        assert known.read_record(folder, None)[0] is None
        with open(f"{folder}/{RECORD}") as record:
            assert json.load(record) == json.loads((PEER / RECORD).read_text())


def answered(page, question, tmp_path, monkeypatch, foreign):
    monkeypatch.setattr(known.Known, "is_foreign", lambda *_: foreign)
    tiny_models.picture().save(tmp_path / "a.png")
    asked = conversation.user_turn(question, [str(tmp_path / "a.png")], [])
    *_, (history, _) = page.answer([asked], None, "", 0, 1, 4)
    return history


def test_foreign_words_get_a_note_and_questions_about_the_picture(page, tmp_path, monkeypatch):
    history = answered(page, "What is the <capital>?", tmp_path, monkeypatch, foreign=False)
    assert conversation.note_of(history[-1]) == "The model has not learned the word “capital”."
    assert [one["value"] for one in history[-1]["options"]] == ENTRY["questions"]
    asked, _ = page.take(history, gr.EventData(None, {"value": ENTRY["questions"][0], "index": 0}))
    assert conversation.text_of(asked[-1]) == ENTRY["questions"][0]
    assert conversation.pictures_of(asked[-1]) == []
    assert conversation.note_of(asked[1]) == conversation.note_of(history[1])  # it stays where it is
    turns, _ = conversation.topic(asked)
    assert "learned" not in turns[1]["content"][0]["text"]  # the model does not read it


def test_a_foreign_picture_gets_a_note_and_questions_about_scenes(page, tmp_path, monkeypatch):
    history = answered(page, "What is in the picture?", tmp_path, monkeypatch, foreign=True)
    assert conversation.note_of(history[-1]).startswith("This picture is unlike")
    buttons = history[-1]["options"]
    assert len(buttons) == 3
    asked, _ = page.take(history, gr.EventData(None, {"value": buttons[1]["value"], "index": 1}))
    example = page.examples.shown[1]
    assert buttons[1]["label"].endswith(example.question)
    assert (conversation.text_of(asked[-1]), conversation.pictures_of(asked[-1])) == (example.question, [example.path])


def test_what_is_known_and_a_checkpoint_that_tells_nothing_get_no_note(page, tmp_path, monkeypatch):
    said = answered(page, "What is in the picture?", tmp_path, monkeypatch, foreign=False)[-1]
    assert (conversation.note_of(said), said["options"]) == ("", [])
    page.answerer.known = None
    page.answerer.forget()
    said = answered(page, "Why?", tmp_path, monkeypatch, foreign=True)[-1]
    assert (conversation.note_of(said), said["options"]) == ("", [])


def test_scores_reach_the_slider_in_order_and_as_numbers(page):
    assert elements.budget_props(page.answerer)["scores"] == []
    page.answerer.scores = [{**row, "mean": "0.5"} for row in SCORES]
    scores = elements.budget_props(page.answerer)["scores"]
    assert [row["visual_tokens"] for row in scores] == [1, 4]
    assert [row["mean"] for row in scores] == [0.5, 0.5]
