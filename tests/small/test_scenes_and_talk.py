"""The small model's pictures and questions: what is drawn is what is said."""

import random

import numpy as np
import pytest
from PIL import Image

from ms_resampler.small import scenes, talk
from ms_resampler.small.parts import things
from ms_resampler.small.scenes import Drawing, Painter, Scene

COLOURS = {"cat": "#e00000", "dog": "#00c000", "owl": "#0000e0", "fish": "#e0e000", "leaf": "#e000e0"}


@pytest.fixture
def painter():
    """Nouns as squares and bars of one colour each, which pixels tell apart; grounds are white."""

    def drawn(noun, width, height):
        shape = f'<rect width="{width}" height="{height}" fill="{COLOURS[noun]}"/>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{shape}</svg>'

    drawings = {
        noun: [Drawing(noun, "a", drawn(noun, 9, 9)), Drawing(noun, "b", drawn(noun, 8, 12))] for noun in COLOURS
    }
    return Painter(drawings, "test-style")


@pytest.fixture
def on_white(monkeypatch):
    monkeypatch.setattr(scenes, "draw_ground", lambda *_: Image.new("RGB", (336, 336), "white"))


def test_things_stand_in_their_boxes(painter, on_white):
    for number in range(40):
        scene = painter.scene(number)
        pixels = np.asarray(scene.image).astype(int)
        covered = np.zeros(pixels.shape[:2], dtype=bool)
        for noun, box in zip(scene.nouns, scene.boxes, strict=True):
            left, top, right, bottom = (round(256 * edge) for edge in box)
            inside = pixels[top + 2 : bottom - 2, left + 2 : right - 2]
            colour = [int(COLOURS[noun][place : place + 2], 16) for place in (1, 3, 5)]
            assert np.abs(inside - colour).max() < 8
            assert not covered[top:bottom, left:right].any()
            covered[top:bottom, left:right] = True
        assert (pixels[~covered] == 255).all()


def test_a_number_is_always_the_same_scene(painter):
    first, again = painter.scene(7), painter.scene(7)
    assert (first.nouns, first.boxes) == (again.nouns, again.boxes)
    assert first.image.tobytes() == again.image.tobytes()
    assert painter.scene(8).image.tobytes() != first.image.tobytes()


def test_scenes_have_the_kinds_that_they_are_said_to_have(painter):
    counts = [painter.choose(number) for number in range(600)]
    single = sum(len(chosen) == 1 for chosen in counts) / 600
    repeated = sum(len({d.noun for d in chosen}) < len(chosen) for chosen in counts) / 600
    assert abs(single - 0.5) < 0.07
    assert abs(repeated - 0.15) < 0.05
    assert max(map(len, counts)) == 5


THREE = Scene(
    Image.new("RGB", (4, 4)),
    ("dog", "owl", "cat"),
    ((0.7, 0.1, 0.9, 0.3), (0.1, 0.05, 0.3, 0.25), (0.4, 0.6, 0.9, 0.9)),
)
TWO_LEAVES = Scene(Image.new("RGB", (4, 4)), ("leaf", "leaf"), ((0.1, 0.1, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9)))


def test_a_scene_is_described_in_reading_order():
    expected = "The picture shows an owl at the top left, a dog at the top right and a cat at the bottom right."
    assert talk.described(THREE) == expected
    assert talk.described(TWO_LEAVES) == "The picture shows two leaves."


def test_answers_follow_from_the_boxes():
    """All that is ever asked of the two scenes, against answers that were written down."""
    asked = {}
    for scene, name in ((THREE, "three"), (TWO_LEAVES, "leaves")):
        for seed in range(300):
            for question, answer in talk.conversation(scene, random.Random(seed)):
                asked.setdefault((name, question.split("\n")[0]), set()).add(answer)
    assert all(len(answers) == 1 for answers in asked.values())
    said = {key: answers.pop() for key, answers in asked.items()}
    assert said["three", "Is the dog to the left of the owl?"] == "no"
    assert said["three", "Is the owl to the left of the dog?"] == "yes"
    assert said["three", "Is the dog above the cat?"] == "yes"
    assert said["three", "Is the cat above the dog?"] == "no"
    assert said["three", "Where is the owl?"] == "It is at the top left."
    assert said["three", "What is the largest thing in the picture?"] == "The cat."
    assert said["three", "What is in the picture?"] == "An owl, a dog and a cat."
    assert said["three", "Can you see a cat?"] == "Yes, there is a cat."
    assert said["leaves", "How many leaves are in the picture?"] == "2"
    assert said["leaves", "What can you see?"] == "I can see two leaves."
    assert said["leaves", "Can you see a leaf?"] == "Yes, there are two leaves."
    for (name, question), answer in said.items():
        if question.startswith("Is there "):
            noun = question.removeprefix("Is there ").removesuffix(" in the picture?").split(" ", 1)[1]
            assert answer == ("yes" if noun in {"three": THREE, "leaves": TWO_LEAVES}[name].nouns else "no")


def test_presence_is_asked_of_as_many_absent_things():
    answers = [answer for seed in range(50) for _, answer in talk.ask_presence(THREE, random.Random(seed))]
    assert answers.count("yes") == answers.count("no") == 100


@pytest.mark.parametrize(
    ("noun", "count", "words"),
    [("owl", 1, "an owl"), ("bus", 3, "three buses"), ("cherry", 2, "two cherries"), ("key", 2, "two keys"),
     ("mouse", 4, "four mice"), ("watch", 2, "two watches"), ("box", 5, "five boxes"), ("fish", 2, "two fish")],
)  # fmt: skip
def test_nouns_have_articles_and_plurals(noun, count, words):
    assert talk.phrase(noun, count) == words


def test_every_noun_has_drawings_to_learn_from():
    for noun, known in things().items():
        assert noun == noun.lower()
        assert set(known) <= {"emoji", "clipart", "classes"}
        assert known.get("emoji") or known.get("clipart")
        assert all(0 <= number < 1000 for number in known.get("classes", []))
    classes = [number for known in things().values() for number in known.get("classes", [])]
    assert len(set(classes)) == len(classes)
