"""The scenes: what is drawn, that answers are true and cannot be guessed, and the records."""

import itertools
import re
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from ms_resampler.tiny import scenes
from ms_resampler.tiny.curriculum import ALL_NAMES, FINDING, SceneConversations, ScenePlaces
from ms_resampler.tiny.scenes import (
    COLOURS,
    FAMILIES,
    NAMES,
    PLACES,
    SHAPES,
    SPLITS,
    WORDS,
    Question,
    ask,
    index_by_name,
    make_record,
    make_scene,
    score,
    transcript,
)

SCENES, TURNS = 1000, 10
YES_NO = {"presence", "relation"}


@pytest.fixture(scope="module")
def drawn():
    return [make_scene("test", index) for index in range(SCENES)]


@pytest.fixture(scope="module")
def asked(drawn):
    return [(scene, question) for n, scene in enumerate(drawn) for question in ask(scene, "test", n, TURNS)]


# --- Scenes -----------------------------------------------------------------------------------------------------


def test_a_scene_follows_from_its_split_and_index():
    first, again = make_scene("train", 7), make_scene("train", 7)
    assert first.things == again.things
    assert first.image.tobytes() == again.image.tobytes()
    assert ask(first, "train", 7, 12) == ask(again, "train", 7, 12)


@pytest.mark.parametrize("other", [("train", 8), ("validation", 7), ("test", 7)])
def test_other_splits_and_indices_give_other_scenes(other):
    assert make_scene("train", 7).image.tobytes() != make_scene(*other).image.tobytes()


def test_scenes_do_not_depend_on_what_was_drawn_before():
    late = make_scene("validation", 3).image.tobytes()
    for cached in (scenes.digit_mask, scenes.shape_mask, scenes.word_mask, scenes.paper_texture):
        cached.cache_clear()
    assert make_scene("validation", 3).image.tobytes() == late


def test_no_digit_image_is_in_two_splits():
    images, shared = scenes.load_digit_images()
    numbers = {split: {n for name in shared[split] for n in shared[split][name]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not numbers[one] & numbers[other]
    assert set().union(*numbers.values()) == set(range(len(images)))
    for split, share in SPLITS.items():
        for name in NAMES["digit"]:
            total = sum(len(shared[s][name]) for s in SPLITS)
            assert abs(len(shared[split][name]) - share * total) <= 1


def test_scenes_use_only_the_digit_images_of_their_split(monkeypatch):
    used, real = set(), scenes.digit_mask
    monkeypatch.setattr(scenes, "digit_mask", lambda number, height: used.add(number) or real(number, height))
    for index in range(100):
        make_scene("test", index)
    assert used
    assert used <= {number for numbers in scenes.load_digit_images()[1]["test"].values() for number in numbers}


def test_an_unknown_split_and_an_impossible_crowd_are_refused():
    with pytest.raises(ValueError, match="no split 'dev'"):
        make_scene("dev", 0)
    with pytest.raises(ValueError, match="max_things=10"):
        make_scene("train", 0, max_things=10)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    scenes.load_digit_images.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"pip install ms-resampler\[train\]"):
            scenes.load_digit_images()
    finally:
        scenes.load_digit_images.cache_clear()


def test_things_lie_inside_the_picture_and_apart(drawn):
    for scene in drawn:
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 < left < right < 96
            assert 0 < top < bottom < 96
        for a, b in itertools.combinations(scene.things, 2):
            apart = max(a.box[0] - b.box[2], b.box[0] - a.box[2], a.box[1] - b.box[3], b.box[1] - a.box[3])
            assert apart >= 2, (scene.seed_key, a, b)


def test_things_are_large_enough_to_read(drawn):
    for thing in (thing for scene in drawn for thing in scene.things):
        width, height = thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]
        assert width >= 20 if thing.kind == "word" else height >= 13, thing


@pytest.mark.parametrize("size", [64, 96, 160])
def test_a_place_follows_from_the_box_and_names_one_thing(size):
    for index in range(150):
        scene = make_scene("train", index, size=size)
        assert scene.image.size == (size, size)
        assert scene.image.mode == "RGB"
        for thing in scene.things:
            x, y = (thing.box[0] + thing.box[2]) / 2 / size, (thing.box[1] + thing.box[3]) / 2 / size
            assert thing.place == PLACES[int(y * 3) * 3 + int(x * 3)]
            for border in (1 / 3, 2 / 3):
                assert min(abs(x - border), abs(y - border)) > 0.02  # 0.03, and rounding to pixels
        places = [thing.place for thing in scene.things]
        assert places == sorted(set(places), key=PLACES.index)


def test_every_thing_is_painted_in_its_colour_and_stands_out(drawn):
    for scene in drawn[:300]:
        pixels = np.asarray(scene.image).astype(int)
        paper = pixels.copy()
        covered = np.zeros(pixels.shape[:2], bool)
        for left, top, right, bottom in (thing.box for thing in scene.things):
            covered[top - 1 : bottom + 1, left - 1 : right + 1] = True
        paper = pixels[~covered]
        for thing in scene.things:
            left, top, right, bottom = thing.box
            distance = np.abs(pixels[top:bottom, left:right] - COLOURS[thing.colour]).max(-1)
            assert (distance < 12).mean() > 0.05, (scene.seed_key, thing)
            # On light paper the dark rim parts them; on dark paper, brightness alone must.
            ink = max(COLOURS[thing.colour])
            assert paper.mean() > 150 or ink - paper.max(-1).mean() > 80, (scene.seed_key, thing)


def test_one_to_six_things_are_equally_likely(drawn):
    counts = Counter(len(scene.things) for scene in drawn)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert max(counts.values()) < 0.22 * SCENES
    assert {len(make_scene("train", index, max_things=2).things) for index in range(30)} == {1, 2}


# --- Answers, derived again from what is on the picture ---------------------------------------------------------


def one(things):
    """The only one: a question that could mean several things fails here."""
    things = list(things)
    assert len(things) == 1, things
    return things[0]


def at_place(scene, text):
    return one(t for t in scene.things if t.place == re.sub("^(at|in) the ", "", text))


def called(scene, text):
    """The thing that "the red circle", "the word cat" or "the 7" means."""
    words = [word for word in text.split() if word not in ("the", "word")]
    colour = words[0] if words[0] in COLOURS else None
    return one(t for t in scene.things if t.name == words[-1] and colour in (None, t.colour))


def middle(thing):
    left, top, right, bottom = thing.box
    return (left + right) / 2, (top + bottom) / 2


def check_read(scene, text):
    kind, place = re.fullmatch(r"(?:What is written|Which (digit|word) is) (.+)\?", text).groups()
    thing = at_place(scene, place)
    assert thing.kind in ((kind,) if kind else ("digit", "word"))
    return thing.name


def check_colour(scene, text):
    subject = re.fullmatch(r"What colour is (.+)\?", text)[1]
    place = re.fullmatch(r"the thing ((?:at|in) the .+)", subject)
    return (at_place(scene, place[1]) if place else called(scene, subject)).colour


def check_shape(scene, text):
    thing = at_place(scene, re.fullmatch(r"(?:Which shape is|What shape is the thing) (.+)\?", text)[1])
    assert thing.kind == "shape"
    return thing.name


def check_presence(scene, text):
    name, half = re.fullmatch(r"(?:Is there|Do you see) (?:an?|the word) (\w+) in the (\w+) half\?", text).groups()
    axis, sign = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}[half]
    shifts = [sign * (middle(t)[axis] - 48) for t in scene.things if t.name == name]
    answer = any(shift > 7 for shift in shifts)
    assert answer or all(shift < -7 for shift in shifts), "too near to the middle to say"
    return "yes" if answer else "no"


def check_count(scene, text):
    kind = re.fullmatch(r"(?:How many|Count the) (\w+?)s(?: are there\?|\.)", text)[1]
    return str(len([t for t in scene.things if kind in ("thing", t.kind)]))


def check_count_colour(scene, text):
    colour = one(word for word in re.findall(r"\w+", text) if word in COLOURS)
    return str([t.colour for t in scene.things].count(colour))


def check_majority(scene, text):
    assert re.fullmatch(r"(Which colour is|What is the) most common( colour)?\?", text)
    colours = [t.colour for t in scene.things]
    most = max(colours.count(colour) for colour in COLOURS)
    return one(colour for colour in COLOURS if colours.count(colour) == most)


def check_relation(scene, text):
    a, relation, b = re.fullmatch(r"Is (the .+) (left of|right of|above|below) (the .+)\?", text).groups()
    (ax, ay), (bx, by) = middle(called(scene, a)), middle(called(scene, b))
    assert abs(ax - bx if relation.endswith("of") else ay - by) > 14, "too near to say"
    return "yes" if {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation] else "no"


def check_compare(scene, text):
    assert not set(text.split()) & set(COLOURS), "the question tells a colour"
    if alike := re.fullmatch(r"Which thing has the same colour as (the .+)\?", text):
        given = called(scene, alike[1])
        return one(t.name for t in scene.things if t.colour == given.colour and t is not given)
    a, b = (called(scene, name) for name in re.fullmatch(r"Which is taller, (the .+) or (the .+)\?", text).groups())
    heights = {t.name: t.box[3] - t.box[1] for t in (a, b)}
    assert max(heights.values()) > 1.25 * min(heights.values()), "too similar to say"
    return max(heights, key=heights.get)


def check_where(scene, text):
    subject = re.fullmatch(r"Where is (the .+)\?", text)[1]
    there = subject.split()[-1] in {t.name for t in scene.things}
    return called(scene, subject).place if there else "nowhere"


def check_describe(scene, text):
    assert text in ("Describe the picture.", "What is in the picture?")
    there = {t.place: t for t in scene.things}
    return ", ".join(f"{p}: {there[p].colour} {there[p].name}" for p in PLACES if p in there)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def test_every_family_has_its_check():
    assert set(CHECKS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_true(asked, family):
    cases = [(scene, question) for scene, question in asked if question.family == family]
    assert len(cases) > 100
    for scene, question in cases:
        assert CHECKS[family](scene, question.question) == question.answer, (scene.seed_key, question)
        assert question.group == FAMILIES[family].group


def test_answers_are_short_lower_case_words(asked):
    known = {"yes", "no", "nowhere", *PLACES, *COLOURS, *SHAPES, *WORDS, *map(str, range(10))}
    assert {question.answer for _, question in asked if question.family != "describe"} <= known


# --- Guessing ---------------------------------------------------------------------------------------------------


def test_guessing_without_the_picture_gains_little(asked):
    """By the most common answer of a family, and by that of the question's very words, learnt on other scenes."""
    learnt = defaultdict(Counter)
    for index in range(SCENES):
        for question in ask(make_scene("train", index), "train", index, TURNS):
            learnt[question.family][question.answer] += 1
            learnt[question.question][question.answer] += 1
    answers, hits = defaultdict(Counter), Counter()
    for _, question in asked:
        seen = learnt[question.question] if learnt[question.question].total() >= 10 else learnt[question.family]
        hits[question.family] += seen.most_common(1)[0][0] == question.answer
        answers[question.family][question.answer] += 1
    for family, counts in answers.items():
        by_family = counts.most_common(1)[0][1] / counts.total()
        by_words = hits[family] / counts.total()
        print(f"{family:13s} {counts.total():5d} questions, guessed {by_family:.3f} by family, {by_words:.3f} by words")
        limit = 0.6 if family in YES_NO else 0.45
        assert max(by_family, by_words) < limit, family


@pytest.mark.parametrize("family", sorted(YES_NO))
def test_yes_and_no_are_equally_likely(asked, family):
    answers = Counter(question.answer for _, question in asked if question.family == family)
    # 3.5 standard deviations of fair coins.
    assert abs(answers["yes"] - answers["no"]) < 3.5 * answers.total() ** 0.5, answers


def test_a_fair_order_never_gives_its_answer_away():
    rng = np.random.default_rng(0)
    for _ in range(200):
        answers = [answer for _, answer in scenes.fair({"yes": ["a"], "no": ["b", "c", "d"]}, rng)]
        # It may not go on when one answer has run out, since then the other would be certain.
        assert answers[:-1].count("yes") < 1
        assert answers[:-1].count("no") < 3
    assert scenes.fair({"yes": [], "no": ["b"]}, rng) == []
    assert scenes.fair({}, rng) == []


# --- Asking -----------------------------------------------------------------------------------------------------


def test_families_are_drawn_evenly_where_all_are_possible(drawn):
    rich = [scene for scene in drawn if len(scene.things) == 6]
    first = Counter(ask(scene, *scene.seed_key, 1)[0].family for scene in rich)
    assert set(first) == set(FAMILIES)
    assert max(first.values()) < 0.25 * len(rich)


def test_no_question_is_asked_twice_before_all_are_used_up(drawn):
    for scene in drawn[:200]:
        if len(scene.things) >= 4:
            texts = [question.question for question in ask(scene, *scene.seed_key, 10)]
            assert len(set(texts)) == len(texts)


def test_a_scene_of_one_thing_still_gives_as_many_questions_as_wanted(drawn):
    scene = next(scene for scene in drawn if len(scene.things) == 1)
    assert len(ask(scene, *scene.seed_key, 40)) == 40


def test_only_the_wanted_families_are_asked(drawn):
    questions = ask(drawn[0], "test", 0, 8, families=["colour", "describe"])
    assert {question.family for question in questions} == {"colour", "describe"}
    lonely = next(scene for scene in drawn if len(scene.things) == 1)
    with pytest.raises(ValueError, match="no question of the families relation"):
        ask(lonely, *lonely.seed_key, 1, families=["relation"])


# --- Transcripts, scores, records -------------------------------------------------------------------------------


def test_a_transcript_lists_every_place_and_exactly_the_things(drawn):
    for scene in drawn[:200]:
        items = [item.split(": ") for item in transcript(scene).split(", ")]
        assert [place for place, _ in items] == list(PLACES)
        said = {(place, *what.split()) for place, what in items if what != "nothing"}
        assert said == {(thing.place, thing.colour, thing.name) for thing in scene.things}


@pytest.mark.parametrize(
    ("reply", "points"), [("cat", 1), (" Cat. ", 1), ("cat\n", 1), ("1", 0), ("", 0), ("cat cat", 0), ("the cat", 0)]
)
def test_a_short_answer_counts_if_it_is_the_same_word(reply, points):
    assert score(Question("read", "local", "What is written at the top?", "cat"), reply) == points


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("top: red 7, left: blue star", 1),
        ("Left: blue star,  top: red 7.", 1),
        ("top: red 7", 2 / 3),
        ("top: red 7, left: green star", 1 / 2),
        ("top: red 7, top: red 7, top: red 7", 2 / 5),
        ("left: red 7, top: blue star", 0),
        ("", 0),
    ],
)
def test_a_description_counts_by_its_items(reply, points):
    question = Question("describe", "global", "Describe the picture.", "top: red 7, left: blue star")
    assert score(question, reply) == pytest.approx(points)


def test_every_true_answer_scores_one(asked):
    assert all(score(question, question.answer) == 1 for _, question in asked)


def test_a_record_is_a_conversation_with_one_image():
    scene = make_scene("train", 5)
    expected = ask(scene, "train", 5, 4)
    record = make_record(scene, [(question.question, question.answer) for question in expected])
    assert record["id"] == "train-5"
    assert record["image"].tobytes() == scene.image.tobytes()
    turns = record["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 4
    assert turns[0]["value"].startswith("<image>\n")
    assert "".join(turn["value"] for turn in turns).count("<image>") == 1
    assert [turn["value"] for turn in turns[1::2]] == [question.answer for question in expected]
    assert turns[2]["value"] == expected[1].question


def test_an_index_finds_every_name_of_its_own_and_nothing_else(drawn):
    for scene in drawn[:200]:
        items = dict(item.split(" ", 1) for item in index_by_name(scene, np.random.default_rng(0)).split(", "))
        names = Counter(thing.name for thing in scene.things)
        there = {t.name: f"{t.place} {t.colour} {t.height // 3}" for t in scene.things if names[t.name] == 1}
        absent = set(items) - set(there)
        assert items == there | dict.fromkeys(absent, "nothing")
        assert 1 <= len(absent) <= 3
        assert not absent & set(names)


def test_an_index_has_no_order_of_its_own(drawn):
    scene = next(scene for scene in drawn if len({thing.name for thing in scene.things}) == 6)
    first = Counter(index_by_name(scene, np.random.default_rng(seed)).split()[0] for seed in range(200))
    assert all(first[thing.name] > 5 for thing in scene.things)


def test_conversations_are_drills_first_and_then_ask():
    data = SceneConversations(length=200, drills=100, turns=5)
    assert len(data) == 200
    drills = Counter()
    for index in range(100):
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in data[index]["conversations"])
        drills[question] += 1
        if question == "Transcribe the picture.":
            assert answer == transcript(make_scene("train", index, max_things=9))
    assert set(drills) == {"Transcribe the picture.", "Index the picture."}
    assert min(drills.values()) > 30
    lengths = Counter(len(data[index]["conversations"]) for index in range(100, 200))
    assert set(lengths) == {2, 10}
    assert 5 < lengths[2] < 40


def test_half_of_the_questioned_scenes_are_asked_only_what_must_be_found():
    data, finding = SceneConversations(length=200, drills=0, turns=8), 0
    for index in range(200):
        turns = [turn["value"].removeprefix("<image>\n") for turn in data[index]["conversations"]]
        asked = [question.question for question in ask(make_scene("train", index), "train", index, 8, FINDING)]
        finding += turns[::2] == asked
    assert 50 < finding < 110


def test_a_blind_conversation_has_no_image():
    record = SceneConversations(length=9, drills=0, turns=2, blind=True)[8]
    assert record["image"] is None
    assert "<image>" not in record["conversations"][0]["value"]


def test_labels_of_places_say_what_is_there():
    for index in range(20):
        scene, record = make_scene("train", index, max_things=9), ScenePlaces(20)[index]
        labels = list(zip(PLACES, record["colours"], record["names"], record["heights"], strict=True))
        told = {
            place: (list(COLOURS)[colour - 1], ALL_NAMES[name - 1], height)
            for place, colour, name, height in labels
            if colour
        }
        assert told == {thing.place: (thing.colour, thing.name, thing.height // 3) for thing in scene.things}
        assert all(name == height == 0 for _, colour, name, height in labels if not colour)


def test_a_picture_of_all_the_shapes_can_be_asked_about():
    """Scene 24599 of the training split has all six: what is absent must then be of another kind."""
    scene = make_scene("train", 24599)
    assert {thing.name for thing in scene.things} == set(SHAPES)
    assert len(ask(scene, "train", 24599, 20)) == 20
