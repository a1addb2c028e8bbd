"""The tasks: each draws a picture of a split and asks about it what follows from how it was drawn."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..tiny import scenes as tiny_scenes
from .pages import crop, lines_of, runs_of
from .scenes import SIDE, Scene, compose, pick, spread
from .sources import RANKS, SUITS, Noun, Region, Shelf, Split, Table, clash, cutout

CLEAR = 0.1  # of the picture's side: how far apart centres are that are asked about
POPULAR = 30  # the nouns that are drawn most often
NTH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
DOT = 15  # pixels from a region's middle, where its name is, down to the dot that marks it


@dataclass(frozen=True)
class Asked:
    """A question. `asks` names its form, for breakdowns; the other fields are a suite's (docs/evaluation.md)."""

    asks: str
    question: str
    answer: str | list[str]
    kind: str
    options: list[str] | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Sheet:
    """A picture and the questions about it. meta: what is recorded with each."""

    image: Image.Image
    questions: tuple[Asked, ...]
    meta: dict[str, Any] = field(default_factory=dict)


def choice(asks: str, question: str, right: str, wrong: Sequence[str], rng: np.random.Generator) -> Asked:
    """A question with options in random order."""
    options = [right, *wrong]
    options = [options[place] for place in rng.permutation(len(options))]
    return Asked(asks, question, chr(65 + options.index(right)), "choice", options)


def sample(items: Sequence, count: int, rng: np.random.Generator) -> list:
    """Some of the items, in random order."""
    return [items[place] for place in rng.permutation(len(items))[:count]]


def yes_no(truth: bool) -> str:
    """A truth as an answer."""
    return "yes" if truth else "no"


# Things in scenes --------------------------------------------------------------------------------------------------


def drawn_nouns(shelf: Shelf, split: Split) -> list[tuple[Noun, list[str]]]:
    """The split's nouns, the most frequent first, each with those of the split's styles that it is drawn in."""
    nouns = [(noun, [s for s in split.looks("styles") if s in noun.drawings]) for noun in shelf.nouns]
    return split.contents([(noun, styles) for noun, styles in nouns if styles], lambda pair: pair[0].name)


def draw_nouns(
    pool: Sequence[tuple[Noun, list[str]]], count: int, rng: np.random.Generator
) -> list[tuple[Noun, list[str]]]:
    """Nouns that cannot be taken for each other; frequent ones come more often, and so do those of one theme."""
    weights = 1 / (np.arange(len(pool)) + 15)
    theme = pick(pool, rng)[0].theme
    weights[[noun.theme == theme for noun, _ in pool]] *= 6
    order = rng.choice(len(pool), size=len(pool), replace=False, p=weights / weights.sum())
    chosen: list[tuple[Noun, list[str]]] = []
    for place in order:
        if len(chosen) == count:
            break
        if not any(clash(pool[place][0], noun) for noun, _ in chosen):
            chosen.append(pool[place])
    return chosen


def draw_scene(
    chosen: Sequence[tuple[Noun, list[str]]], rng: np.random.Generator, counts: Sequence[int] | None = None
) -> tuple[Scene, dict[str, Any]]:
    """A scene of nouns, each in a random one of its styles, and what is recorded of it."""
    counts = counts or [1] * len(chosen)
    styles = [pick(styles, rng) for _, styles in chosen]
    pictures = [cutout(noun.drawings[style]) for (noun, _), style in zip(chosen, styles, strict=True)]
    scene = compose([picture for picture, count in zip(pictures, counts, strict=True) for _ in range(count)], rng)
    return scene, recorded(scene, style=sorted(set(styles)))


def recorded(scene: Scene, **fields: Any) -> dict[str, Any]:
    """What is recorded of a scene's questions."""
    covered = sum((box[2] - box[0]) * (box[3] - box[1]) for box in scene.boxes) / SIDE**2
    return {"layout": scene.layout, "ground": scene.ground, "cover": round(covered, 3), **fields}


def presence(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """Whether a thing is there, of three to six: one that is, and one that is not (random, popular or of the theme)."""
    pool = drawn_nouns(shelf, split)
    chosen = draw_nouns(pool, int(rng.integers(3, 7)), rng)
    scene, meta = draw_scene(chosen, rng)
    present = [noun for noun, _ in chosen]
    absent = [noun for noun, _ in pool if not any(clash(noun, other) for other in present)]
    how = pick(("random", "popular", "co-occurring"), rng)
    themes = {noun.theme for noun in present}
    among = {
        "random": absent,
        "popular": absent[:POPULAR],
        "co-occurring": [noun for noun in absent if noun.theme in themes] or absent,
    }[how]
    pair = (pick(present, rng), pick(among, rng))
    questions = tuple(
        Asked("presence", f"Is there {noun.phrase} in the picture?", yes_no(noun in present), "yes/no")
        for noun in sample(pair, 2, rng)
    )
    return Sheet(scene.image, questions, meta | {"absent": how})


def naming(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """What a single thing is: one of four nouns, one of them of the same theme."""
    pool = drawn_nouns(shelf, split)
    noun, styles = pick(pool, rng)
    scene, meta = draw_scene([(noun, styles)], rng)
    others = [other for other, _ in pool if not clash(other, noun)]
    near = sample([other for other in others if other.theme == noun.theme], 1, rng)
    wrong = [*near, *sample([other for other in others if other not in near], 3 - len(near), rng)]
    asked = choice("name", "What is shown in the picture?", noun.name, [other.name for other in wrong], rng)
    return Sheet(scene.image, (asked,), meta | {"theme": noun.theme})


def relations(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet | None:
    """Where two of two to four things are from each other; nothing where that is not clear."""
    chosen = draw_nouns(drawn_nouns(shelf, split), int(rng.integers(2, 5)), rng)
    scene, meta = draw_scene(chosen, rng)
    (a, b), (one, two) = [noun for noun, _ in chosen[:2]], [centre(box) for box in scene.boxes[:2]]
    across, down = ((two[axis] - one[axis]) / SIDE for axis in (0, 1))
    clear = {axis: abs(distance) > CLEAR / 2 for axis, distance in (("across", across), ("down", down))}
    questions = []
    for axis, distance, words in (("across", across, ("left", "right")), ("down", down, ("above", "below"))):
        if clear[axis]:
            word = pick(words, rng)
            place = f"to the {word} of" if axis == "across" else word
            question = f"Is the {a.name} {place} the {b.name}?"
            questions.append(Asked(axis, question, yes_no((distance > 0) == (word == words[0])), "yes/no"))
    if min(abs(across), abs(down)) < max(abs(across), abs(down)) / 2 and any(clear.values()):
        sides = ["left of it", "right of it", "above it", "below it"]
        right = sides[(across < 0) if abs(across) > abs(down) else 2 + (down < 0)]
        question = f"Where is the {a.name}, seen from the {b.name}?"
        questions.append(choice("side", question, right, [side for side in sides if side != right], rng))
    return Sheet(scene.image, tuple(questions), meta) if questions else None


def centre(box: Sequence[float]) -> tuple[float, float]:
    """The (x, y) of a box's centre."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def counting(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """How often one thing is there, beside others, and how many things there are."""
    chosen = draw_nouns(drawn_nouns(shelf, split), int(rng.integers(1, 4)), rng)
    counts = [int(rng.integers(1, 6)), *(int(rng.integers(1, 3)) for _ in chosen[1:])]
    scene, meta = draw_scene(chosen, rng, counts)
    questions = [Asked("one", f"How many times is {chosen[0][0].phrase} shown?", str(counts[0]), "number")]
    if len(chosen) > 1:
        questions.append(Asked("all", "How many things are in the picture?", str(sum(counts)), "number"))
    return Sheet(scene.image, tuple(questions), meta)


# Cards, words and pages --------------------------------------------------------------------------------------------


def cards(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """Rank and suit of one card, or how many cards, and of which suits, are shown."""
    deck = pick(split.looks("decks"), rng)
    pack = split.contents([(rank, suit) for suit in SUITS for rank in RANKS], " of ".join)
    count = 1 if rng.random() < 0.5 else int(rng.integers(2, 7))
    shown = sample(pack, count, rng)
    scene = compose([shelf.card(deck, *card) for card in shown], rng, ("full", "margin", "corner"))
    rank, suit = shown[0]
    questions: tuple[Asked, ...] = (
        Asked(
            "rank",
            "What is the rank of the card?",
            [rank, str(RANKS.index(rank) + 1)][: 1 + (rank in RANKS[1:10])],
            "open",
        ),
        choice("suit", "What is the suit of the card?", suit, [other for other in SUITS if other != suit], rng),
    )
    if count > 1:
        number = sum(other == suit for _, other in shown)
        asked = pick([pick(pack, rng), pick(shown, rng)], rng)
        questions = (
            Asked("how many", "How many cards are shown?", str(count), "number"),
            Asked("of a suit", f"How many of the cards are {suit}?", str(number), "number"),
            Asked("shown", f"Is the {' of '.join(asked)} shown?", yes_no(asked in shown), "yes/no"),
        )
    return Sheet(scene.image, questions, recorded(scene, deck=deck))


def words(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """One word to read, or which of several is highest, and whether a word is there."""
    font = pick(split.looks("fonts"), rng)
    dictionary = split.contents(list(dict.fromkeys(pick(shelf.words, rng) for _ in range(80))))
    chosen = sample(dictionary, 1 if rng.random() < 0.5 else int(rng.integers(2, 6)), rng)
    scene = compose([written(word, shelf.font(font, 56), rng) for word in chosen], rng)
    meta = recorded(scene, font=font, several=len(chosen) > 1)
    if len(chosen) == 1:
        return Sheet(scene.image, (Asked("read", "Which word is written in the picture?", chosen[0], "open"),), meta)
    tops = [box[1] for box in scene.boxes]
    asked, absent = pick(chosen, rng), pick(dictionary, rng)
    shown = absent if rng.random() < 0.5 else asked
    questions = [
        Asked("how many", "How many words are written in the picture?", str(len(chosen)), "number"),
        Asked("is there", f"Is the word “{shown}” in the picture?", yes_no(shown in chosen), "yes/no"),
    ]
    first, second = sorted(range(len(tops)), key=tops.__getitem__)[:2]
    if scene.boxes[first][3] <= scene.boxes[second][1]:
        questions.append(Asked("highest", "Which word is highest in the picture?", chosen[first], "open"))
    return Sheet(scene.image, tuple(questions), meta)


def written(word: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> Image.Image:
    """A word as a cut-out, in a random colour with a rim of the opposite brightness."""
    ink = rng.integers(0, 256, 3)
    rim = "white" if ink.mean() < 128 else "black"
    left, top, right, bottom = (round(part) for part in font.getbbox(word, stroke_width=3))
    image = Image.new("RGBA", (right - left + 2, bottom - top + 2))
    draw = ImageDraw.Draw(image)
    draw.text((1 - left, 1 - top), word, font=font, fill=tuple(map(int, ink)), stroke_width=3, stroke_fill=rim)
    return image


def documents(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """A part of a typeset page: of a real text, to read a line of it, or of a real record, to find a number in it."""
    font, size = pick(split.looks("fonts"), rng), int(rng.integers(13, 19))
    if rng.random() < 0.5:
        table = pick(split.contents(shelf.tables, lambda table: table.name), rng)
        lines, questions = record_page(table, rng)
        where = "record"
    else:
        title = pick(split.contents(list(shelf.texts)), rng)
        lines, questions = text_page(shelf.texts[title], shelf.font(font, size), rng)
        where = "text"
    while max(shelf.font(font, size).getlength(line) for line in lines) > SIDE - 24:
        size -= 1
    step = round(size * 1.5)
    crowded = rng.random() < 0.5
    top = int(rng.integers(12, 30)) if crowded else int(rng.integers(12, SIDE - step * len(lines) - 8))
    page = Image.new("RGB", (SIDE, SIDE), pick(("#ffffff", "#fbf7ec", "#f1f1f1"), rng))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((16, top + number * step), line, font=shelf.font(font, size), fill="#1b1b1b")
    return Sheet(page, tuple(questions), {"font": font, "page": where, "text size": f"{size} pixels"})


def text_page(text: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator) -> tuple[list[str], list[Asked]]:
    """Some lines of a text, and questions about one of them."""
    widest = int((SIDE - 32) / (font.getlength(text[:400]) / len(text[:400])) * 0.86)
    every = textwrap.wrap(text, widest)
    count = min(len(every), int(rng.integers(3, 9)))
    start = int(rng.integers(len(every) - count + 1))
    lines = every[start : start + count]
    number = int(rng.integers(count))
    return lines, [
        *ask_line(lines, number),
        Asked("lines", "How many lines of text are there?", str(count), "number"),
    ]


def ask_line(lines: Sequence[str], number: int) -> tuple[Asked, Asked]:
    """To read a line, and its first word."""
    return (
        Asked("line", f"What does the {NTH[number]} line say?", lines[number], "open"),
        Asked("first word", f"What is the first word of the {NTH[number]} line?", lines[number].split()[0], "open"),
    )


def record_page(table: Table, rng: np.random.Generator) -> tuple[list[str], list[Asked]]:
    """Some rows of a table as a list, and a number to find."""
    rows = sample(table.rows, int(rng.integers(3, 8)), rng)
    column = pick(list(table.columns), rng)
    name, values = pick(rows, rng)
    lines = [
        f"{table.title},",
        f"{table.columns[column]}:",
        *(f"{row} ... {shown(cells[column])}" for row, cells in rows),
    ]
    question = f"Which number stands beside “{name}”?"
    return lines, [
        Asked("number", question, plain_figure(values[column]), "number"),
        Asked("entries", "How many entries does the list have?", str(len(rows)), "number"),
    ]


def shown(number: float) -> str:
    """A number as it is printed in pictures: "1,250,000" or "4.5"."""
    return f"{number:,.0f}" if number == int(number) else f"{number:,}"


def plain_figure(number: float) -> str:
    """A number as an answer: "1250000" or "4.5"."""
    return shown(number).replace(",", "")


def pages(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet | None:
    """Some lines of a page of a manual: to read one, to find a number or a word; nothing where no lines can be cut out.

    Raises ValueError if there are no manuals.
    """
    if shelf.pages is None:
        raise ValueError("The task pages needs Debian's packages of manuals, which apt-get cannot fetch here.")
    manual = pick(split.looks("manuals"), rng)
    path, number = pick(split.contents(shelf.pages[manual], lambda page: f"{page[0].name} {page[1]}"), rng)
    every = lines_of(path, number)
    runs = runs_of(every, len(NTH))
    if not runs:
        return None
    (run, box), scale = pick(runs, rng), float(rng.uniform(1.3, 2.0))
    lines = [line.text for line in run]
    known = [set(re.findall("[A-Za-z]{5,}", line.text)) for line in every]
    here = set(re.findall("[A-Za-z]{5,}", " ".join(lines)))
    absent = sorted(word for word in set().union(*known) if word.lower() not in " ".join(lines).lower())
    questions = [*ask_line(lines, int(rng.integers(len(lines))))]
    figures = [(place, found) for place, line in enumerate(lines) if len(found := re.findall(r"[\d.]+", line)) == 1]
    whole = [(place, found[0]) for place, found in figures if re.search(rf"(?<![\w.-]){found[0]}(?!\w)", lines[place])]
    if numbers := [(place, found) for place, found in whole if found.isdigit()]:
        place, figure = pick(numbers, rng)
        questions.append(Asked("number", f"Which number is in the {NTH[place]} line?", figure, "number"))
    if here and absent:
        word = pick(sorted(here) if rng.random() < 0.5 else absent, rng)
        questions.append(Asked("is there", f"Is the word “{word}” in the picture?", yes_no(word in here), "yes/no"))
    meta = {"manual": manual, "text size": f"{round(10 * scale)} pixels"}
    return Sheet(crop(path, number, box, scale), tuple(questions), meta)


# Charts and maps ---------------------------------------------------------------------------------------------------


def charts(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet | None:
    """A chart of some rows of a real table: a value, the largest, a difference; nothing where rows are too alike."""
    from matplotlib import style
    from matplotlib.figure import Figure

    table = pick(split.contents(shelf.tables, lambda table: table.name), rng)
    column, plot = pick(list(table.columns), rng), pick(split.looks("plots"), rng)
    order = [table.rows[place] for place in rng.permutation(len(table.rows))][: int(rng.integers(3, 8))]
    top = max(cells[column] for _, cells in order)
    # What is too short to be measured is left out, and equal values are drawn once.
    rows = list({v: (name, v) for name, cells in order if (v := cells[column]) > top / 12}.values())
    names, values = [name for name, _ in rows], [value for _, value in rows]
    if len(values) < 3 or sorted(values)[-2] > 0.95 * top or min(values) > 0.9 * top:
        return None
    form, printed = pick(("columns", "bars", "line"), rng), bool(rng.random() < 0.5)
    with style.context(plot):
        figure = Figure(figsize=(4.2, 4.2), dpi=80, layout="constrained")
        axes = figure.subplots()
        ends = draw_chart(axes, form, names, values)
        axes.set_title(f"{table.title}: {table.columns[column]}", fontsize=11)
        if printed:
            for (x, y), value in zip(ends, values, strict=True):
                align: dict[str, Any] = (
                    {"ha": "left", "va": "center"} if form == "bars" else {"ha": "center", "va": "bottom"}
                )
                axes.annotate(shown(value), (x, y), xytext=(2, 2), textcoords="offset points", fontsize=9, **align)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    image = Image.open(file).convert("RGB")
    largest = int(np.argmax(values))
    one = pick(range(len(values)), rng)
    high, low = largest, pick([place for place, value in enumerate(values) if value < 0.9 * top], rng)
    if rng.random() < 0.5:
        high = max(
            (place for place in range(len(values)) if values[place] * 0.9 > values[low]), key=lambda p: -values[p]
        )
    difference = plain_figure(round(values[high] - values[low], 6))
    tolerance = 0.0 if printed else 0.05
    questions = (
        Asked("value", f"What is the value of {names[one]}?", plain_figure(values[one]), "number", tolerance=tolerance),
        choice(
            "largest",
            "Which has the largest value?",
            names[largest],
            sample([n for n in names if n != names[largest]], 3, rng),
            rng,
        ),
        Asked(
            "difference", f"By how much is {names[high]} larger than {names[low]}?", difference, "number", tolerance=0.1
        ),
    )
    return Sheet(image, questions, {"plot": plot, "form": form, "values": "printed" if printed else "to be measured"})


def draw_chart(axes: Any, form: str, names: Sequence[str], values: Sequence[float]) -> list[tuple[float, float]]:
    """Draws a chart; returns where each value ends."""
    places = list(range(len(names)))
    (axes.xaxis if form == "bars" else axes.yaxis).set_major_formatter("{x:,.10g}")
    colours = [f"C{place}" for place in places]
    if form == "bars":
        axes.barh(places, values, color=colours)
        axes.set_yticks(places, names, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.locator_params(axis="x", nbins=3)
        return list(zip(values, places, strict=True))
    if form == "columns":
        axes.bar(places, values, color=colours)
    else:
        axes.plot(places, values, marker="o")
    axes.set_ylim(0, 1.2 * max(values))
    axes.set_xticks(places, names, rotation=35, ha="right", fontsize=9)
    return list(zip(places, values, strict=True))


def maps(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet | None:
    """A part of a map, a colour a region: which lies further north or east, and which is marked.

    Nothing where the part shows fewer than three regions well.
    """
    which = pick(list(shelf.maps), rng)
    regions = shelf.maps[which]
    middle = pick(split.contents(regions, lambda region: region.name), rng)
    palette, font = pick(split.looks("palettes"), rng), shelf.font(pick(split.looks("fonts"), rng), 12)
    image, there = draw_map(
        regions, middle, float(rng.uniform(12, 28) if which == "countries" else rng.uniform(6, 12)), palette
    )
    seen = {name: place for name, place in there.items() if len(name) < 16}
    new = [name for name in seen if name in {region.name for region in split.contents(regions, lambda r: r.name)}]
    if len(seen) < 4 or len(new) < 2:
        return None
    named = bool(rng.random() < 0.5)
    draw = ImageDraw.Draw(image)
    if named:
        for name, place in seen.items():
            draw.text(place, name, font=font, fill="black", anchor="mm", stroke_width=2, stroke_fill="white")
    a, b = sample(new, 2, rng)
    questions = []
    for word, axis, sign in (("north", 1, -1), ("east", 0, 1)):
        distance = (seen[a][axis] - seen[b][axis]) * sign / SIDE
        if abs(distance) > CLEAR:
            first, second, further = (a, b, distance > 0) if rng.random() < 0.5 else (b, a, distance < 0)
            questions.append(Asked(word, f"Is {first} {word} of {second} on this map?", yes_no(further), "yes/no"))
    x, y = seen[marked := pick(new, rng)]
    draw.ellipse((x - 7, y + DOT - 7, x + 7, y + DOT + 7), fill="red", outline="white", width=2)
    wrong = sample([name for name in seen if name != marked], 3, rng)
    questions.append(choice("marked", "Which region is marked with a red dot?", marked, wrong, rng))
    return Sheet(image, tuple(questions), {"map": which, "names": "printed" if named else "not printed"})


def draw_map(
    regions: Sequence[Region], middle: Region, reach: float, palette: str
) -> tuple[Image.Image, dict[str, tuple[float, float]]]:
    """The part of a map within `reach` degrees of a region's middle, and the centroids of the regions that show well.

    The centroids are those of the pixels that a region has in the picture; a dot below one lies in the region.
    """
    from matplotlib import colormaps

    centre_x, centre_y = max(middle.rings, key=len).mean(axis=0)
    narrow = max(0.3, np.cos(np.radians(centre_y)))  # of a degree of longitude, beside one of latitude
    numbers = Image.new("I;16", (SIDE, SIDE))
    picture = Image.new("RGB", (SIDE, SIDE), "#cfe3ee")
    ink, paint = ImageDraw.Draw(numbers), ImageDraw.Draw(picture)
    colours = colormaps[palette]
    drawn = 0
    edges = np.array([centre_x - reach / narrow, centre_y - reach, centre_x + reach / narrow, centre_y + reach])
    for number, region in enumerate(regions, start=1):
        near = (region.bounds[:, :2] < edges[2:]).all(1) & (region.bounds[:, 2:] > edges[:2]).all(1)
        outlines = []
        for place in np.flatnonzero(near):
            x = ((region.rings[place][:, 0] - centre_x) * narrow / reach + 1) * SIDE / 2
            y = (1 - (region.rings[place][:, 1] - centre_y) / reach) * SIDE / 2
            outlines.append(list(zip(x.tolist(), y.tolist(), strict=True)))
        colour = tuple(round(255 * part) for part in colours(drawn % colours.N)[:3])
        for outline in outlines:
            ink.polygon(outline, fill=number)
            paint.polygon(outline, fill=colour, outline="#555555")
        drawn += bool(outlines)
    pixels = np.asarray(numbers)
    there = {}
    for number in np.flatnonzero(np.bincount(pixels.ravel()) > 0.012 * SIDE**2).tolist():
        if number:  # 0 is the sea
            rows, columns = np.nonzero(pixels == number)
            x, y = float(columns.mean()), float(rows.mean())
            if 24 < x < SIDE - 24 and 12 < y < SIDE - 26 and pixels[round(y + DOT), round(x)] == number:
                there[regions[number - 1].name] = (x, y)
    return picture, there


# Drawn scenes ------------------------------------------------------------------------------------------------------


def scenes(shelf: Shelf, split: Split, rng: np.random.Generator) -> Sheet:
    """A scene of digits, shapes and words (ms_resampler.tiny), which exist for training and for test alone."""
    index = int(rng.integers(10**9))
    scene = tiny_scenes.make_scene(split.name, index)
    families = [name for name in tiny_scenes.FAMILIES if name != "describe"]
    asked = tiny_scenes.ask(scene, split.name, index, 2, families)
    return Sheet(scene.image, tuple(Asked(q.family, q.question, q.answer, kind_of(q.answer)) for q in asked))


def kind_of(answer: str) -> str:
    """The kind of question that an answer is of."""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "open"


Drawer = Callable[[Shelf, Split, np.random.Generator], Sheet | None]
TASKS: dict[str, Drawer] = {
    drawer.__name__: drawer
    for drawer in (presence, naming, relations, counting, cards, maps, words, documents, pages, charts, scenes)
}


def draw_sheet(task: str, shelf: Shelf, split: Split, seed: int, index: int) -> Sheet:
    """Picture number `index` of a task and split; `index` and `seed` decide everything."""
    place = (seed, crc32(f"{task} {split.name}".encode()), index)
    for attempt in range(200):
        sheet = TASKS[task](shelf, split, np.random.default_rng((*place, attempt)))
        if sheet is not None:
            return Sheet(sheet.image, sheet.questions, sheet.meta | spread(sheet.image))
    raise ValueError(f"The packages have nothing to ask for the task {task} and the split {split.name}.")
