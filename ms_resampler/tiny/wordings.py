"""The many ways in which people ask what the scenes' questions ask, and what else they say to a demo.

Each way of asking is one template; with the openings and endings there are thousands of wordings. Those listed under
HELD_OUT are seen by no training, and measure how well the model understands what it was not taught.
"""

import re
from collections.abc import Sequence

import numpy as np

from .scenes import NAMES, Scene, absent_name, make_scene, noun, pick

# A question as the scenes ask it, and other ways to ask it. "at" is "at the top left" or "in the centre".
WAYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What is written (?P<at>.+)\?",
        (
            "What does it say {at}?",
            "Read what is {at}.",
            "What can you read {at}?",
            "Tell me what is written {at}.",
            "{At}, what is written?",
            "What do you read {at}?",
        ),
    ),
    (
        r"Which (?P<kind>digit|word|shape) is (?P<at>.+)\?",
        (
            "What {kind} is {at}?",
            "What is the {kind} {at}?",
            "Name the {kind} {at}.",
            "Tell me the {kind} {at}.",
            "Which {kind} do you see {at}?",
            "The {kind} {at} is which one?",
            "{At} there is a {kind}. Which one?",
        ),
    ),
    (
        r"What shape is the thing (?P<at>.+)\?",
        (
            "What is the shape of the thing {at}?",
            "Name the shape of what is {at}.",
            "Which shape has the thing {at}?",
            "Tell me the shape of the object {at}.",
            "What shape does the object {at} have?",
        ),
    ),
    (
        r"What colour is the thing (?P<at>.+)\?",
        (
            "What is the colour of the thing {at}?",
            "What color is the thing {at}?",
            "Which colour does the thing {at} have?",
            "Tell me the colour of the object {at}.",
            "What colour do you see {at}?",
            "In which colour is the thing {at}?",
            "What is the color of what is {at}?",
            "{At} there is something. What colour is it?",
        ),
    ),
    (
        r"What colour is (?P<a>.+)\?",
        (
            "What is the colour of {a}?",
            "What color is {a}?",
            "Which colour does {a} have?",
            "Tell me the colour of {a}.",
            "Name the color of {a}.",
            "{A} has which colour?",
            "What is the color of {a}?",
            "In which colour is {a}?",
        ),
    ),
    (
        r"(?:Is there|Do you see) (?P<a>.+) in the (?P<half>\w+) half\?",
        (
            "Can you see {a} in the {half} half?",
            "Does the {half} half show {a}?",
            "Is {a} in the {half} half?",
            "In the {half} half, is there {a}?",
            "Look at the {half} half. Is there {a}?",
            "Does the {half} half have {a}?",
            "Is {a} shown in the {half} half of the picture?",
        ),
    ),
    (
        r"Where is (?P<a>.+)\?",
        (
            "Where can I find {a}?",
            "Where do you see {a}?",
            "Tell me where {a} is.",
            "In which place is {a}?",
            "Find {a}.",
            "{A} is where?",
            "At which place is {a}?",
            "Where in the picture is {a}?",
        ),
    ),
    (
        r"Is (?P<a>.+) (?P<side>left of|right of|above|below) (?P<b>.+)\?",
        (
            "Does {a} stand {side} {b}?",
            "Can you see {a} {side} {b}?",
            "Is it true that {a} is {side} {b}?",
            "Tell me whether {a} is {side} {b}.",
            "{A} is {side} {b}, right?",
            "Do you find {a} {side} {b}?",
        ),
    ),
    (
        r"Which is taller, (?P<a>.+) or (?P<b>.+)\?",
        (
            "What is taller, {a} or {b}?",
            "Which is the taller one, {a} or {b}?",
            "Which one is taller: {a} or {b}?",
            "Compare {a} and {b}. Which is taller?",
            "Of {a} and {b}, which is taller?",
            "Is {a} taller, or {b}?",
        ),
    ),
    (
        r"Which thing has the same colour as (?P<a>.+)\?",
        (
            "What has the same colour as {a}?",
            "Which thing has the color of {a}?",
            "Name the thing with the same colour as {a}.",
            "What else has the colour of {a}?",
            "Which other thing is coloured like {a}?",
        ),
    ),
    (
        r"(?:How many (?P<a>\w+?)s are there|Count the (?P<b>\w+)s)[?.]",
        (
            "How many {a}s do you see?",
            "How many {a}s are in the picture?",
            "What is the number of {a}s?",
            "Tell me how many {a}s there are.",
            "Give the number of {a}s.",
            "Count all {a}s.",
            "How many {a}s can you count?",
            "How many {a}s does the picture show?",
        ),
    ),
    (
        r"How many (?:things are (?P<a>\w+)|(?P<b>\w+) things are there)\?",
        (
            "How many {a} things do you see?",
            "Count the {a} things.",
            "What is the number of {a} things?",
            "Tell me how many things are {a}.",
            "How many of the things are {a}?",
            "How many objects are {a}?",
            "How many {a} things are in the picture?",
        ),
    ),
    (
        r"(?:Which colour is|What is the) most common(?: colour)?\?",
        (
            "What colour is most common?",
            "Which colour do most things have?",
            "Name the most common colour.",
            "Which color is there most often?",
            "What is the most frequent colour?",
            "Tell me the most common color.",
            "What colour are most things?",
        ),
    ),
    (
        r"(?:Describe the picture\.|What is in the picture\?)",
        (
            "Describe the image.",
            "What do you see?",
            "What can you see in the picture?",
            "What does the picture show?",
            "What is on the image?",
            "Describe what you see.",
            "Tell me what is in the picture.",
            "List everything in the picture.",
            "Describe this picture.",
            "What is this?",
            "What is in this image?",
            "Describe this image in detail.",
            "Tell me what you see.",
        ),
    ),
)
LAST = 2  # ways of each question that are held out
OPENINGS = ("", "", "", "Please tell me: ", "Look at the picture. ", "A question: ", "Hi! ", "And now: ", "Please: ")
ENDINGS = ("", "", "", " Thanks.", " Please.", " Answer briefly.")
HELD_OUT_OPENINGS = ("", "", "I would like to know: ", "Look closely. ")
HELD_OUT_ENDINGS = ("", "", " Thank you!", " Be brief.")

GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there", "Hi there")
HELD_OUT_GREETINGS = ("Good day", "Hey there", "Hello, how are you")
WELCOME = "Hello! Ask me about digits, shapes and words in the picture."
THANKS = ("Thank you.", "Thanks!", "Thanks a lot.", "Thank you very much.", "Great, thanks.")
NO_PICTURE = "I see no picture. Add one, and ask again."


def in_other_words(question: str, rng: np.random.Generator, held_out: bool = False) -> str:
    """A random other wording of a scene's question: one of those that training uses, or one that is held out."""
    for pattern, ways in WAYS:
        if found := re.fullmatch(pattern, question):
            parts = {name: value for name, value in found.groupdict().items() if value}
            if "b" in parts and "a" not in parts:
                parts["a"] = parts["b"]
            parts |= {name.capitalize(): value[0].upper() + value[1:] for name, value in parts.items()}
            text = pick(ways[-LAST:] if held_out else ways[:-LAST], rng).format(**parts)
            opening = pick(HELD_OUT_OPENINGS if held_out else OPENINGS, rng)
            return opening + text + pick(HELD_OUT_ENDINGS if held_out else ENDINGS, rng)
    raise AssertionError(f"no other wording of {question!r} is known")


def greeting(rng: np.random.Generator, held_out: bool = False) -> tuple[str, str]:
    """A greeting and its answer."""
    return pick(HELD_OUT_GREETINGS if held_out else GREETINGS, rng) + pick(("", "!", "."), rng), WELCOME


def about_nothing(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a thing that is not there, which has another answer than "nowhere"."""
    absent = f"the {absent_name(scene, rng)}"
    question = in_other_words(f"What colour is {absent}?", rng) if rng.random() < 0.5 else f"What colour is {absent}?"
    return question, f"there is no {absent.removeprefix('the ')}"


ORDINALS = ("first", "second", "third")


def about_one_of(number: int, question: str, rng: np.random.Generator) -> str:
    """A question about one of several pictures, counted from 0."""
    place = ORDINALS[number]
    ways = (
        f"In the {place} picture: ",
        f"In picture {number + 1}: ",
        f"The {place} picture. ",
        f"Picture {number + 1}: ",
    )
    return pick(ways, rng) + question


def across(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[str, str]:
    """A question across two pictures: which of them shows a thing, or more things."""
    if rng.random() < 0.3:
        counts = [len(scene.things) for scene in scenes]
        answer = "both alike" if counts[0] == counts[1] else ORDINALS[counts.index(max(counts))]
        return pick(("Which picture has more things?", "In which picture are more things?"), rng), answer
    names = [{noun(thing) for thing in scene.things} for scene in scenes]
    # Which of the four cases is drawn first, so that none can be guessed.
    cases = {
        "first": sorted(names[0] - names[1]),
        "second": sorted(names[1] - names[0]),
        "both": sorted(names[0] & names[1]),
        "none": sorted(
            text
            for kind, of_kind in NAMES.items()
            for name in of_kind
            if (text := f"word {name}" if kind == "word" else name) not in names[0] | names[1]
        ),
    }
    answer = pick([answer for answer, found in cases.items() if found], rng)
    thing = pick(cases[answer], rng)
    article = "the" if thing.startswith("word") else "an" if thing == "8" else "a"
    return f"{pick(('Which picture shows', 'Which picture has'), rng)} {article} {thing}?", answer


def beside(scene: Scene, count: int) -> list[Scene]:
    """A scene and others of its split, `count` in all, determined by the scene."""
    split, index = scene.seed_key
    return [scene, *(make_scene(split, 10_000_000 + index * len(ORDINALS) + other) for other in range(1, count))]
