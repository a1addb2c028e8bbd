"""Other ways to ask and to talk: the same meaning, hundreds of them, and held-out ones that training never uses."""

import re
from collections import Counter

import numpy as np
import pytest

from ms_resampler.tiny.curriculum import BUDGETS, BudgetCollator, SceneConversations
from ms_resampler.tiny.evaluate import Asked, about_two, evaluate_budgets, evaluate_wordings
from ms_resampler.tiny.model import assemble_tiny
from ms_resampler.tiny.scenes import COLOURS, NAMES, PLACES, ask, make_scene, noun, scene_rng
from ms_resampler.tiny.wordings import (
    NO_PICTURE,
    WELCOME,
    about_nothing,
    across,
    beside,
    in_other_words,
)

KNOWN = {*COLOURS, *(name for names in NAMES.values() for name in names), *" ".join(PLACES).split()}
KNOWN |= {"taller", "above", "below", "half", "thing", "things"} | {f"{kind}s" for kind in NAMES}


def meaning(text: str) -> list[str]:
    """The words of a question that say what it is about."""
    text = (
        re.sub(r"every (\w+)", r"\1s", text.lower())
        .replace("the number of", "")
        .replace("which one", "")
        .replace("the right?", "the right")
    )
    return sorted({word for word in re.findall(r"\w+", text) if word in KNOWN} - {"right", "thing", "things"})


def test_other_words_mean_the_same():
    rng = np.random.default_rng(0)
    asked = [question for index in range(300) for question in ask(make_scene("train", index), "train", index, 12)]
    asked = [question for question in asked if question.family not in ("majority", "describe")]
    for question in asked:
        for held_out in (False, True):
            other = in_other_words(question.question, rng, held_out)
            assert not held_out or other != question.question
            assert meaning(other) == meaning(question.question), other


def wordings(question: str, held_out: bool) -> set[str]:
    rng = np.random.default_rng(1)
    return {in_other_words(question, rng, held_out) for _ in range(4000)}


@pytest.mark.parametrize(
    "question",
    [
        "What is written at the top left?",
        "Which digit is in the centre?",
        "What shape is the thing at the top right?",
        "What colour is the thing in the centre?",
        "What colour is the star?",
        "Is there an 8 in the left half?",
        "Where is the word cat?",
        "Is the star above the word cat?",
        "Which is taller, the 7 or the ring?",
        "Which thing has the same colour as the 5?",
        "How many shapes are there?",
        "How many things are red?",
        "Which colour is most common?",
        "Describe the picture.",
    ],
)
def test_there_are_many_wordings_and_none_is_held_out(question):
    trained, held_out = wordings(question, False), wordings(question, True)
    assert len(trained) > 60
    assert len(held_out) > 10
    assert not trained & held_out
    assert len({text.lower() for text in trained}) < len(trained)  # some are typed without capitals


def test_a_question_of_no_family_has_no_other_words():
    with pytest.raises(AssertionError, match="no other wording of 'Why\\?'"):
        in_other_words("Why?", np.random.default_rng(0))


def test_questions_across_two_pictures_are_true_and_even():
    answers = Counter()
    for index in range(1200):
        scenes = beside(make_scene("train", index), 2)
        text, answer = across(scenes, scene_rng("train", index, 1))
        if found := re.fullmatch(r"Which picture (?:shows|has) (?:a|an|the) (.+)\?", text):
            there = [found[1] in {noun(thing) for thing in scene.things} for scene in scenes]
            assert answer == {(1, 0): "first", (0, 1): "second", (1, 1): "both", (0, 0): "none"}[tuple(map(int, there))]
            answers[answer] += 1
        else:
            first, second = (len(scene.things) for scene in scenes)
            assert answer == ("both alike" if first == second else "first" if first > second else "second")
    assert min(answers[case] for case in ("first", "second", "none")) > 150


def test_what_is_absent_is_absent():
    for index in range(200):
        scene = make_scene("train", index)
        text, answer = about_nothing(scene, scene_rng("train", index, 2))
        absent = answer.removeprefix("there is no ")
        assert f"the {absent}" in text.replace("The", "the")
        assert absent not in {noun(thing) for thing in scene.things}


def test_scenes_beside_are_others_and_always_the_same():
    scene = make_scene("test", 4)
    first, second, third = beside(scene, 3)
    assert first is scene
    assert len({one.image.tobytes() for one in (first, second, third)}) == 3
    assert [one.things for one in beside(scene, 3)] == [one.things for one in (first, second, third)]


def test_conversations_vary_in_pictures_greetings_and_words():
    records = [SceneConversations(2000, drills=0, turns=10, varied=True)[index] for index in range(600)]
    pictures = Counter(
        len(r["image"]) if isinstance(r["image"], list) else int(r["image"] is not None) for r in records
    )
    for record in records:
        images = record["image"] if isinstance(record["image"], list) else [record["image"]] * bool(record["image"])
        assert record["conversations"][0]["value"].count("<image>") == len(images)
        assert (record["conversations"][1]["value"] == NO_PICTURE) == (not images)
    assert 0 < pictures[0] < 20
    assert 30 < pictures[2] + pictures[3] < 150
    said = Counter(turn["value"] for record in records for turn in record["conversations"])
    assert said[WELCOME] > 20
    assert sum(count for text, count in said.items() if text.startswith("there is no ")) > 50
    assert SceneConversations(2000, 0, 10, varied=True)[7]["conversations"] == records[7]["conversations"]


def test_each_batch_has_one_budget_and_the_default_is_the_most_frequent():
    _, processor = assemble_tiny(0)
    collate, data = BudgetCollator(processor, 1024), SceneConversations(9000, drills=9000, turns=2)
    found = Counter()
    for start in range(0, 120, 2):
        batch = collate([data[start], data[start + 1]])
        counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
        assert counts[0] == counts[1] == batch["token_grids"][0].prod()
        found[counts[0]] += 1
    assert set(found) <= set(BUDGETS)
    assert found.most_common(1)[0][0] == 36
    assert len(found) > 6


class Oracle:
    """Stands in for a model that is evaluated."""

    def eval(self):
        return self


def test_budgets_and_wordings_are_scored_for_what_was_asked(monkeypatch):
    """By an answerer who does no more than greet."""
    asked_at = []

    def answered(model, processor, records):
        asked_at.append((processor, len(records)))
        texts = [record["conversations"][0]["value"] for record in records]
        return [WELCOME if re.search("Good day|Hey there|how are you", text) else "?" for text in texts]

    class Processor:
        images_kwargs = None

    monkeypatch.setattr("ms_resampler.tiny.evaluate.answer", answered)
    rows = {row.family: row for row in evaluate_wordings(Oracle(), Processor(), scenes=12)}
    assert rows["greetings, held out"].mean == 1
    assert rows["the scenes' words"].mean == rows["absent things"].mean == 0
    assert rows["the scenes' words"].questions == rows["other words, held out"].questions > 80
    asked_at.clear()
    budgets = evaluate_budgets(Oracle(), Processor(), scenes=3)
    assert [row.visual_tokens for row in budgets] == [1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144]
    assert {processor.images_kwargs["visual_tokens"] for processor, _ in asked_at} == {
        row.visual_tokens for row in budgets
    }
    assert sum(count for _, count in asked_at) == sum(row.questions for row in budgets)


def test_a_question_about_one_of_two_pictures_names_it():
    numbers = Counter()
    for index in range(100):
        found: Asked = about_two(make_scene("test", index))
        _, question, shown = found
        assert len(shown) == 2
        number = int(bool(re.search("second|2:", question.question.split(":")[0] + ":" + question.question[:20])))
        numbers[number] += 1
        own = question.question.split(": ", 1)[-1].split("picture. ", 1)[-1]
        assert (own, question.answer) in {
            (q.question, q.answer) for q in ask(shown[number], *shown[number].seed_key, 1)
        }
    assert min(numbers.values()) > 25
