"""The many ways in which people ask what the scenes' questions ask, and what else they say to a demo.

Each way of asking is one template; with the openings and endings there are thousands of wordings. The last ways of
each question, and what is listed under HELD_OUT, are seen by no training, and measure how well the model understands
what it was not taught.
"""

import re
from collections.abc import Sequence

import numpy as np

from .scenes import NAMES, Scene, absent_name, make_scene, noun, pick

# A question as the scenes ask it, and other ways to ask it. "at" is "at the top left" or "in the centre"; "name" stands
# for what may lead in to a noun ("Tell me the colour of ..."), "say" to a clause ("Tell me which colour ... has").
WAYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"What is written (?P<at>.+)\?",
        (
            "What does it say {at}?",
            "Read what is {at}.",
            "Read {at}.",
            "What can you read {at}?",
            "{say} what is written {at}.",
            "{say} what you read {at}.",
            "{say} what it says {at}.",
            "{name} the text {at}.",
            "Which digit or word is {at}?",
            "What digit or word do you see {at}?",
            "What stands {at}?",
            "What is {at}?",
            "What do you see {at}?",
            "{At}, what does it say?",
            "{At}: what can you read?",
            "{At}, what is written?",
            "What do you read {at}?",
        ),
    ),
    (
        r"Which (?P<kind>digit|word|shape) is (?P<at>.+)\?",
        (
            "What {kind} is {at}?",
            "{name} the {kind} {at}.",
            "{name} the {kind} that is {at}.",
            "{say} which {kind} is {at}.",
            "{say} which {kind} you see {at}.",
            "{say} what {kind} stands {at}.",
            "Which {kind} do you see {at}?",
            "Which {kind} can you see {at}?",
            "Which {kind} stands {at}?",
            "What {kind} do you find {at}?",
            "What {kind} is shown {at}?",
            "{At}, which {kind} is it?",
            "{At}: which {kind}?",
            "Which {kind} is that {at}?",
            "You see a {kind} {at}. Which?",
            "The {kind} {at} is which one?",
            "{At} there is a {kind}. Which one?",
        ),
    ),
    (
        r"What shape is the thing (?P<at>.+)\?",
        (
            "{name} the shape of the thing {at}.",
            "{name} the shape of what is {at}.",
            "{name} the shape of the object {at}.",
            "{say} what shape the thing {at} has.",
            "{say} which shape is {at}.",
            "Which shape is the thing {at}?",
            "What shape is the object {at}?",
            "What shape is what you see {at}?",
            "Of what shape is the thing {at}?",
            "{At}, what shape is the thing?",
            "Which shape has the thing {at}?",
            "Of which form is the thing {at}?",
            "What shape does the object {at} have?",
        ),
    ),
    (
        r"What colour is the thing (?P<at>.+)\?",
        (
            "{name} the {colour} of the thing {at}.",
            "{name} the {colour} of what is {at}.",
            "{name} the {colour} of the object {at}.",
            "{say} which {colour} the thing {at} has.",
            "{say} what {colour} it is {at}.",
            "{say} the {colour} {at}.",
            "What {colour} is the thing {at}?",
            "Which {colour} does the thing {at} have?",
            "Which {colour} has the object {at}?",
            "What {colour} do you see {at}?",
            "What {colour} is what you see {at}?",
            "What {colour} is it {at}?",
            "Which {colour} can you see {at}?",
            "In which {colour} is the thing {at}?",
            "{At}, what {colour} is the thing?",
            "{At}: which {colour}?",
            "You see a thing {at}. Which {colour} does it have?",
            "How is the thing {at} coloured?",
            "{At} there is something. What colour is it?",
        ),
    ),
    (
        r"What colour is (?P<a>.+)\?",
        (
            "{name} the {colour} of {a}.",
            "{name} the {colour} that {a} has.",
            "{name} {a}'s {colour}.",
            "{say} which {colour} {a} has.",
            "{say} what {colour} {a} is.",
            "{say} in which {colour} {a} is drawn.",
            "What {colour} is {a}?",
            "Which {colour} is {a}?",
            "Which {colour} does {a} have?",
            "Which {colour} has {a}?",
            "What {colour} was {a} drawn in?",
            "What {colour} do you see on {a}?",
            "{A} has which {colour}?",
            "{A}: what {colour}?",
            "Look at {a}. What {colour} is it?",
            "Find {a} and say its {colour}.",
            "How is {a} coloured?",
            "In which colour is {a}?",
        ),
    ),
    (
        r"(?:Is there|Do you see) (?P<a>.+) in the (?P<half>\w+) half\?",
        (
            "Can you see {a} in the {half} half?",
            "Can you find {a} in the {half} half?",
            "Does the {half} half show {a}?",
            "Does the {half} half contain {a}?",
            "Is {a} in the {half} half?",
            "Is there {a} in the {half} half of the picture?",
            "Do you see {a} in the {half} half of the image?",
            "In the {half} half, is there {a}?",
            "In the {half} half, do you see {a}?",
            "Look at the {half} half. Is there {a}?",
            "Look at the {half} half. Do you find {a}?",
            "{say} whether there is {a} in the {half} half.",
            "{say} if {a} is in the {half} half.",
            "There is {a} in the {half} half, is there not?",
            "Does the {half} half have {a}?",
            "Is {a} shown in the {half} half of the picture?",
        ),
    ),
    (
        r"Where is (?P<a>.+)\?",
        (
            "Where can I find {a}?",
            "Where can I see {a}?",
            "Where do you see {a}?",
            "Where does {a} stand?",
            "{say} where {a} is.",
            "{say} where you see {a}.",
            "{say} where to find {a}.",
            "{name} the place of {a}.",
            "{name} the position of {a}.",
            "In which place is {a}?",
            "In what place do you see {a}?",
            "Find {a}.",
            "Find {a} for me.",
            "Look for {a}. Where is it?",
            "{A} is where?",
            "{A}: where is it?",
            "At which place is {a}?",
            "Where in the picture is {a}?",
        ),
    ),
    (
        r"Is (?P<a>.+) (?P<side>left of|right of|above|below) (?P<b>.+)\?",
        (
            "Does {a} stand {side} {b}?",
            "Can you see {a} {side} {b}?",
            "Do you see {a} {side} {b}?",
            "Is it true that {a} is {side} {b}?",
            "Is it so that {a} stands {side} {b}?",
            "{say} whether {a} is {side} {b}.",
            "{say} if {a} is {side} {b}.",
            "Look at {a}. Is it {side} {b}?",
            "{A} is {side} {b}. True?",
            "{A} is {side} {b}, is it not?",
            "Would you say that {a} is {side} {b}?",
            "Is {a} somewhere {side} {b}?",
            "{A} is {side} {b}, right?",
            "Do you find {a} {side} {b}?",
        ),
    ),
    (
        r"Which is taller, (?P<a>.+) or (?P<b>.+)\?",
        (
            "What is taller, {a} or {b}?",
            "Which one is taller: {a} or {b}?",
            "Which is the taller one, {a} or {b}?",
            "Which of the two is taller, {a} or {b}?",
            "Which is taller: {a}, or is it {b}?",
            "Compare {a} and {b}. Which is taller?",
            "Look at {a} and {b}. Which one is taller?",
            "{say} which is taller, {a} or {b}.",
            "{say} what is taller: {a} or {b}.",
            "{name} the taller one, {a} or {b}.",
            "{A} or {b}: which is taller?",
            "Of {a} and {b}, which is taller?",
            "Is {a} taller, or {b}?",
        ),
    ),
    (
        r"Which thing has the same colour as (?P<a>.+)\?",
        (
            "What has the same {colour} as {a}?",
            "What thing has the same {colour} as {a}?",
            "Which thing has the {colour} of {a}?",
            "{name} the thing with the same {colour} as {a}.",
            "{name} the thing that has the {colour} of {a}.",
            "{say} what has the same {colour} as {a}.",
            "{say} which thing is of the same {colour} as {a}.",
            "What is of the same {colour} as {a}?",
            "Look at {a}. What else is of that {colour}?",
            "{A} has the same {colour} as which thing?",
            "What else has the colour of {a}?",
            "Which other thing is coloured like {a}?",
        ),
    ),
    (
        r"(?:How many (?P<a>\w+?)s are there|Count the (?P<b>\w+)s)[?.]",
        (
            "How many {a}s do you see?",
            "How many {a}s do you find?",
            "How many {a}s are in the picture?",
            "How many {a}s are in this image?",
            "How many {a}s are shown?",
            "How many {a}s is that?",
            "{name} the number of {a}s.",
            "{name} the number of {a}s in the picture.",
            "{say} how many {a}s there are.",
            "{say} how many {a}s you see.",
            "Count all {a}s.",
            "Count every {a}.",
            "Please count the {a}s.",
            "What number of {a}s do you see?",
            "The {a}s: how many are there?",
            "How many {a}s can you count?",
            "How many {a}s does the picture show?",
        ),
    ),
    (
        r"How many (?:things are (?P<a>\w+)|(?P<b>\w+) things are there)\?",
        (
            "How many {a} things do you see?",
            "How many {a} things can you find?",
            "How many {a} things are shown?",
            "How many of them are {a}?",
            "How many of the things are {a}?",
            "How many things have the {colour} {a}?",
            "Count the {a} things.",
            "Count what is {a}.",
            "Count all things that are {a}.",
            "{name} the number of {a} things.",
            "{name} the number of things that are {a}.",
            "{say} how many things are {a}.",
            "{say} how many {a} things there are.",
            "What number of things are {a}?",
            "{A} things: how many are there?",
            "How many objects are {a}?",
            "How many {a} things are in the picture?",
        ),
    ),
    (
        r"(?:Which colour is|What is the) most common(?: colour)?\?",
        (
            "What {colour} is most common?",
            "Which {colour} do most things have?",
            "Which {colour} do you see most?",
            "Which {colour} is there most often?",
            "Which {colour} is the most common one?",
            "What {colour} do most of them have?",
            "{name} the most common {colour}.",
            "{name} the {colour} of most things.",
            "{name} the most frequent {colour}.",
            "{say} which {colour} is most common.",
            "{say} what {colour} most things are.",
            "Most things have which {colour}?",
            "The colour that most things have is which?",
            "What colour are most things?",
        ),
    ),
    (
        r"(?:Describe the picture\.|What is in the picture\?)",
        (
            "Describe the image.",
            "Describe it.",
            "Describe this.",
            "Describe this picture.",
            "Describe what you see.",
            "Describe all that you see.",
            "Please describe the picture.",
            "Can you describe the image?",
            "Describe the picture in detail.",
            "Give a description.",
            "What do you see?",
            "What can you see?",
            "What can you see in the picture?",
            "What do you see in this image?",
            "What does the picture show?",
            "What does this image show?",
            "What is shown here?",
            "What is here?",
            "What is there?",
            "What is on the image?",
            "What is this?",
            "What is this picture of?",
            "What is in this image?",
            "What things are there?",
            "Which things are in the picture?",
            "{say} what is in the picture.",
            "{say} what the image shows.",
            "Name everything in the picture.",
            "Name all things.",
            "List everything in the picture.",
            "List all that you see.",
            "Describe this image in detail.",
            "Tell me what you see.",
        ),
    ),
)
SAY = (
    "Tell me", "Say", "Please say", "I want to know", "Can you tell me", "Can you say", "Do you know", "Let me know",
    "Please tell me", "Find out", "Can you see", "Do you see", "Explain",
)  # fmt: skip
NAME = (
    "What is", "What's", "Tell me", "Name", "Give", "Give me", "Please give me", "Say", "Write", "Please name",
    "Show me", "Do you know", "I need",
)  # fmt: skip
ASKING = ("What", "Do ", "Can ")  # what begins so is a question
LAST = 2  # ways of each question that are held out
OPENINGS = (
    "Please tell me: ", "Tell me: ", "Tell me this: ", "Can you tell me: ", "I want to know: ", "I wonder: ",
    "Please: ", "Look at the picture. ", "Look at this. ", "Look at this picture. ", "Look here. ",
    "See this image. ", "Please look. ", "Here is a picture. ", "Nice picture. ", "This is a picture. ",
    "A question: ", "Question: ", "Next question: ", "My question is: ", "One more: ", "Another one: ", "Hi! ",
    "Hello! ", "Hey! ", "Good morning. ", "And now: ", "Now: ", "And: ", "OK. ", "Well. ", "So: ", "Good. ",
    "Great. ", "Think first. ", "Be careful. ", "Let us see. ", "Quickly: ", "Dear model: ", "For me: ",
)  # fmt: skip
ENDINGS = (
    " Thanks.", " Thanks!", " Please.", " Please!", " Answer briefly.", " Answer in a word.", " Only the answer.",
    " OK?", " Say it briefly.", " What do you think?", " I need to know.", " Think first.", " Be careful.",
    " Tell me.", " You can do it!", " That is my question.",
)  # fmt: skip
SYLLABLES = (
    "ba", "be", "bo", "da", "di", "du", "fa", "fe", "ga", "go", "ha", "hi", "ka", "la", "le", "li", "lo", "ma", "mi",
    "mo", "na", "ne", "pa", "pe", "po", "ra", "re", "ri", "ro", "sa", "se", "so", "ta", "te",
)  # fmt: skip
SMALL = re.compile(r"\b(?:what|which|where|there|that|have|does|tell|picture|image|most|many|with|this|please)\b", re.I)
AS_IT_IS, MADE_UP, IN_SMALL_LETTERS, UNSTOPPED, MISSPELT = 0.5, 0.15, 0.15, 0.15, 0.1
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
            parts |= {"say": pick(SAY, rng), "name": pick(NAME, rng), "colour": pick(("colour", "color"), rng)}
            text = pick(ways[-LAST:] if held_out else ways[:-LAST], rng).format(**parts)
            if text.startswith(ASKING):
                text = f"{text[:-1]}?"
            if held_out:
                return pick(HELD_OUT_OPENINGS, rng) + text + pick(HELD_OUT_ENDINGS, rng)
            return as_people_type(lead_in(rng) + text + lead_out(rng), rng)
    raise AssertionError(f"no other wording of {question!r} is known")


def lead_in(rng: np.random.Generator) -> str:
    """What may be said before a question; words that mean nothing, too, since people use words that are not trained."""
    if rng.random() < AS_IT_IS:
        return ""
    return (
        f"{made_up(rng).capitalize()}{pick((': ', '. ', ', '), rng)}" if rng.random() < MADE_UP else pick(OPENINGS, rng)
    )


def lead_out(rng: np.random.Generator) -> str:
    """What may be said after a question."""
    if rng.random() < AS_IT_IS:
        return ""
    return f" {made_up(rng).capitalize()}{pick('.!', rng)}" if rng.random() < MADE_UP else pick(ENDINGS, rng)


def made_up(rng: np.random.Generator) -> str:
    """One to three words of random syllables."""
    words = ("".join(pick(SYLLABLES, rng) for _ in range(rng.integers(1, 4))) for _ in range(rng.integers(1, 4)))
    return " ".join(words)


def as_people_type(text: str, rng: np.random.Generator) -> str:
    """The same with a slip of the pen in a word that can be guessed, without a capital, or without its last stop."""
    if rng.random() < MISSPELT and (found := list(SMALL.finditer(text))):
        start = found[int(rng.integers(len(found)))].start() + int(rng.integers(1, 3))
        text = text[:start] + text[start + 1 :] if rng.random() < 0.5 else text[:start] + text[start] + text[start:]
    if rng.random() < IN_SMALL_LETTERS:
        text = text.lower()
    return text.rstrip("?.!") if rng.random() < UNSTOPPED else text


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
