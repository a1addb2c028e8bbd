"""Scenes: small pictures of handwritten digits, shapes and words, with questions whose answers are known.

Everything is determined by (split, index). Digit images are divided among the splits, so that no test scene contains a
digit image of the training scenes. Answers are balanced, so that guessing without the picture gains little.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# The whole vocabulary: six colours (RGB), six shapes, ten digits and twelve words, at nine places.
COLOURS = {
    "red": (226, 52, 48),
    "orange": (255, 145, 20),
    "yellow": (250, 225, 40),
    "green": (40, 180, 75),
    "blue": (60, 120, 245),
    "purple": (175, 80, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple(map(str, range(10)))
WORDS = ("cat", "sun", "key", "box", "map", "ice", "fly", "toy", "egg", "bus", "dog", "owl")
NAMES = {"digit": DIGITS, "shape": SHAPES, "word": WORDS}
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "centre" for row in ROWS for column in COLUMNS)
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # shares of the digit images

# How scenes are drawn. Lengths are in widths of the picture.
THEME_ODDS = 0.45  # probability of the scene's main colour, or kind, so that majorities and pairs exist
SIDE = (0.2, 0.35)  # height of a digit or shape
WORD_WIDTH = (0.3, 0.38)
CELL_MARGIN = 0.03  # least distance of a thing's centre from the border of its cell
EDGE = 2  # pixels between a thing and the edge of the picture
GAP = 3  # pixels between two things, one of them for the rim of each
PAPERS = 12  # textures kept of each style
FIRM = [min(max((value - 70) * 11 // 5, 0), 255) for value in range(256)]  # grey levels of an enlarged digit
FAINT = [value * 7 // 10 for value in range(256)]  # grey levels of a rim

# How clear a case must be for a question. Lengths are in widths of the picture.
CLEAR_SHIFT = 0.15  # "left of", "above": between the centres
CLEAR_HALF = 0.08  # "in the top half": from the centre to the middle of the picture
CLEAR_RATIO = 1.3  # "taller": of the heights

TRANSCRIBE, INDEX = "Transcribe the picture.", "Index the picture."
HEIGHTS = 32  # steps of a thing's height in an index: the height of the picture

Box = tuple[int, int, int, int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Thing:
    """A digit, shape or word. `box` is (left, top, right, bottom) in pixels, `place` one of PLACES."""

    kind: str
    name: str
    colour: str
    box: Box
    place: str

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def height(self) -> int:
        """In pixels."""
        return self.box[3] - self.box[1]


@dataclass(frozen=True)
class Scene:
    """A picture, its things in reading order of the places, and the (split, index) that determine it."""

    image: Image.Image
    things: tuple[Thing, ...]
    seed_key: tuple[str, int]


@dataclass(frozen=True)
class Question:
    """A question of a family, whose answer needs a local, regional or global look."""

    family: str
    group: str
    question: str
    answer: str


def scene_rng(split: str, index: int, stream: int) -> np.random.Generator:
    """The generator of one scene: stream 0 draws the scene, 1 its questions, 2 its drills, 3 its batch."""
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; the splits are {', '.join(SPLITS)}.")
    return np.random.default_rng(np.random.SeedSequence((list(SPLITS).index(split), index, stream)))


def pick(items: Sequence[Item], rng: np.random.Generator) -> Item:
    """A random item. (`Generator.choice` is many times slower.)"""
    return items[int(rng.integers(len(items)))]


# --- Glyphs: masks of things, white on black, cropped to their ink ----------------------------------------------


@cache
def load_digit_images() -> tuple[list[np.ndarray], dict[str, dict[str, list[int]]]]:
    """Handwritten 8 x 8 digits (0 to 1, cropped to their ink), and the numbers of those of each split and name.

    Each class is divided in the proportions of SPLITS.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("The scenes need scikit-learn's digits: pip install ms-resampler[train]") from None
    data = load_digits()
    shared: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    for digit, name in enumerate(DIGITS):
        numbers = np.flatnonzero(data.target == digit)
        ends = np.round(np.cumsum(list(SPLITS.values())) * len(numbers)).astype(int)
        for split, part in zip(SPLITS, np.split(numbers, ends[:-1]), strict=True):
            shared[split][name] = part.tolist()
    return [crop_to_ink(image / 16) for image in data.images], shared


def crop_to_ink(pixels: np.ndarray) -> np.ndarray:
    """Crops empty rows and columns, but keeps one empty pixel for soft edges when enlarged."""
    ink = pixels > 0.2
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return np.pad(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)


def digit_number(name: str, split: str, rng: np.random.Generator) -> int:
    """A random one of the split's handwritten images of a digit."""
    return pick(load_digit_images()[1][split][name], rng)


@lru_cache(maxsize=4096)
def digit_mask(number: int, height: int) -> Image.Image:
    """Handwritten digit number `number`, `height` pixels high: smooth, but with firm strokes."""
    pixels = load_digit_images()[0][number]
    # Two of the rows are padding, so the ink is enlarged a little more.
    scale = height / (pixels.shape[0] - 1.3)
    sides = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
    smooth = Image.fromarray((pixels * 255).astype(np.uint8)).resize(sides, Image.Resampling.BICUBIC)
    firm = smooth.point(FIRM)
    return firm.crop(firm.getbbox())


@cache
def shape_mask(name: str, height: int) -> Image.Image:
    """A filled shape `height` pixels high, drawn four times larger and scaled down for smooth edges."""
    side = 4 * height
    mask = Image.new("L", (side, side))
    draw, end = ImageDraw.Draw(mask), side - 1
    if name == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif name == "square":
        draw.rectangle((0, 0, end, end), fill=255)
    elif name == "triangle":
        draw.polygon(((side // 2, 0), (end, end), (0, end)), fill=255)
    elif name == "cross":
        draw.rectangle((side * 3 // 8, 0, side * 5 // 8, end), fill=255)
        draw.rectangle((0, side * 3 // 8, end, side * 5 // 8), fill=255)
    elif name == "ring":
        draw.ellipse((0, 0, end, end), outline=255, width=side // 5)
    else:
        draw.polygon(star_corners(side), fill=255)
    mask = mask.crop(mask.getbbox())
    return mask.resize((round(height * mask.width / mask.height), height), Image.Resampling.BOX)


def star_corners(side: int) -> list[tuple[float, float]]:
    """The ten corners of a star in a square of `side` pixels."""
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, side * 0.52, side * 0.23)
    x, y = side / 2 + np.cos(angles) * radii, side * 0.52 + np.sin(angles) * radii
    return list(zip(x.tolist(), y.tolist(), strict=True))


@cache
def word_mask(word: str, width: int) -> Image.Image:
    """A word `width` pixels wide."""
    font = ImageFont.load_default(48)
    left, top, right, bottom = map(int, font.getbbox(word, stroke_width=1))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font, stroke_width=1)
    mask = mask.crop(mask.getbbox())
    return mask.resize((width, round(width * mask.height / mask.width)), Image.Resampling.BOX)


# --- Papers and paint -------------------------------------------------------------------------------------------


@cache
def paper_texture(style: str, variant: int, size: int) -> np.ndarray:
    """Grey levels (int16, size x size) to add to a dark tint, or to take from a light one."""
    rng = np.random.default_rng((list(STYLES).index(style), variant))
    rows, columns = np.mgrid[0:size, 0:size] / size
    return STYLES[style](rows, columns, rng).astype(np.int16)


# Made from a pixel's row and column, both from 0 to 1. Faint enough that every colour stands out.
STYLES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "plain": lambda rows, columns, rng: 0 * rows,
    "gradient": lambda rows, columns, rng: 30 * abs(np.cos(a := rng.uniform(0, 3.14)) * rows + np.sin(a) * columns),
    "noise": lambda rows, columns, rng: rng.normal(0, 5, rows.shape),
    "stripes": lambda rows, columns, rng: 7 * np.sign(np.sin((rows * rng.uniform() + columns) * rng.uniform(30, 60))),
    "dots": lambda rows, columns, rng: 14 * (np.sin(rows * (f := rng.uniform(30, 50))) * np.sin(columns * f) > 0.6),
}


def draw_paper(size: int, rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """Plain, graded, noisy, striped or dotted paper; and whether it is light."""
    light = bool(rng.random() < 0.5)
    tint = rng.integers(215, 249, 3) if light else rng.integers(8, 49, 3)
    texture = paper_texture(pick(list(STYLES), rng), int(rng.integers(PAPERS)), size)[:, :, None]
    pixels = tint.astype(np.int16) + (-texture if light else texture)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), light


def paint(picture: Image.Image, mask: Image.Image, colour: str, corner: tuple[int, int], light: bool) -> None:
    """Pastes a thing in its colour; on light paper with a dark rim of one pixel, or yellow would vanish."""
    if light:
        rim = Image.new("L", (mask.width + 2, mask.height + 2))
        rim.paste(mask, (1, 1))
        rim = rim.filter(ImageFilter.MaxFilter(3)).point(FAINT)
        picture.paste((20, 20, 25), (corner[0] - 1, corner[1] - 1), rim)
    picture.paste(COLOURS[colour], corner, mask)


# --- Scenes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A thing before it has a size in pixels. `number` is a digit's image; `side` is relative to the picture."""

    kind: str
    name: str
    colour: str
    number: int
    side: float

    def mask(self, scale: float) -> Image.Image:
        """The thing's mask where a side of 1 is `scale` pixels."""
        side = round(self.side * scale)
        if self.kind == "digit":
            return digit_mask(self.number, side)
        return shape_mask(self.name, side) if self.kind == "shape" else word_mask(self.name, side)


def make_scene(split: str, index: int, *, max_things: int = 6, size: int = 96) -> Scene:
    """Scene number `index` of a split: 1 to `max_things` (at most 9) things on a paper of `size` x `size` pixels."""
    if not 1 <= max_things <= len(PLACES):
        raise ValueError(f"A scene has 1 to {len(PLACES)} things, not max_things={max_things}.")
    rng = scene_rng(split, index, 0)
    picture, light = draw_paper(size, rng)
    cells = sorted(rng.permutation(len(PLACES))[: rng.integers(1, max_things + 1)].tolist())
    drafts = draw_drafts(len(cells), split, rng)
    masks, boxes = arrange(drafts, cells, size, rng)
    for draft, mask, box in zip(drafts, masks, boxes, strict=True):
        paint(picture, mask, draft.colour, box[:2], light)
    things = tuple(
        Thing(draft.kind, draft.name, draft.colour, box, PLACES[cell])
        for draft, box, cell in zip(drafts, boxes, cells, strict=True)
    )
    return Scene(picture, things, (split, index))


def draw_drafts(count: int, split: str, rng: np.random.Generator) -> list[Draft]:
    """Random things, many of them in the scene's main colour or of its main kind."""
    kinds, colours = list(NAMES), list(COLOURS)
    main_kind, main_colour = pick(kinds, rng), pick(colours, rng)
    drafts = []
    for _ in range(count):
        kind = main_kind if rng.random() < THEME_ODDS else pick(kinds, rng)
        colour = main_colour if rng.random() < THEME_ODDS else pick(colours, rng)
        name = pick(NAMES[kind], rng)
        number = digit_number(name, split, rng) if kind == "digit" else 0
        side = float(rng.uniform(*(WORD_WIDTH if kind == "word" else SIDE)))
        drafts.append(Draft(kind, name, colour, number, side))
    return drafts


def arrange(
    drafts: list[Draft], cells: list[int], size: int, rng: np.random.Generator
) -> tuple[list[Image.Image], list[Box]]:
    """Masks of the things and boxes in their cells that do not touch; in a crowd all things shrink a little."""
    scale = float(size)
    while True:
        masks = [draft.mask(scale) for draft in drafts]
        boxes: dict[int, Box] = {}
        # The widest first, since they have the least choice.
        for number in sorted(range(len(cells)), key=lambda number: -masks[number].width):
            box = find_box(masks[number].size, cells[number], size, boxes.values(), rng)
            if box is None:
                break
            boxes[number] = box
        else:
            return masks, [boxes[number] for number in range(len(cells))]
        scale *= 0.995


def find_box(
    sides: tuple[int, int], cell: int, size: int, taken: Collection[Box], rng: np.random.Generator
) -> Box | None:
    """A random box of (width, height) `sides` centred in the cell, clear of the others; None after 12 tries."""
    row, column = divmod(cell, 3)
    spans = []
    for number, side in ((column, sides[0]), (row, sides[1])):
        low = max((number / 3 + CELL_MARGIN) * size, side / 2 + EDGE)
        high = min(((number + 1) / 3 - CELL_MARGIN) * size, size - side / 2 - EDGE)
        spans.append((low - side / 2, high - side / 2))
    for x, y in rng.random((12, 2)).tolist():
        left, top = (round(low + share * (high - low)) for share, (low, high) in zip((x, y), spans, strict=True))
        box = (left, top, left + sides[0], top + sides[1])
        if not any(touch(box, other) for other in taken):
            return box
    return None


def touch(a: Box, b: Box) -> bool:
    """Whether less than GAP pixels lie between two boxes."""
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP


# --- Questions: a family makes (question, answer) pairs, in the order in which they are to be asked --------------

Asked = list[tuple[str, str]]


def at(place: str) -> str:
    """Where a place is: "top left" -> "at the top left", "centre" -> "in the centre"."""
    return "in the centre" if place == "centre" else f"at the {place}"


def noun(thing: Thing) -> str:
    """What a thing is called: "circle", "7", "word cat"."""
    return f"word {thing.name}" if thing.kind == "word" else thing.name


def plainly_named(scene: Scene) -> list[tuple[Thing, str]]:
    """The things whose names occur once, and how to refer to them: "the circle"."""
    names = Counter(thing.name for thing in scene.things)
    return [(thing, f"the {noun(thing)}") for thing in scene.things if names[thing.name] == 1]


def named(scene: Scene) -> list[tuple[Thing, str]]:
    """The things that are unique by name, or by colour and name: "the circle", "the red circle"."""
    names = Counter(thing.name for thing in scene.things)
    looks = Counter((thing.colour, thing.name) for thing in scene.things)
    return [
        (thing, f"the {noun(thing)}" if names[thing.name] == 1 else f"the {thing.colour} {noun(thing)}")
        for thing in scene.things
        if looks[thing.colour, thing.name] == 1
    ]


def pairs_of(items: Sequence[Item], rng: np.random.Generator) -> list[tuple[Item, Item]]:
    """Every pair once, in random order and orientation, so that the order gives nothing away."""
    pairs = [(a, b) if rng.random() < 0.5 else (b, a) for n, a in enumerate(items) for b in items[:n]]
    return shuffled(pairs, rng)


def shuffled(items: Iterable[Item], rng: np.random.Generator) -> list[Item]:
    """The items in random order."""
    items = list(items)
    return [items[number] for number in rng.permutation(len(items))]


def fair(by_answer: dict[str, list[str]], rng: np.random.Generator) -> Asked:
    """An order in which every answer is as likely as any other each time, whatever was asked before.

    It ends when an answer has no question left: {"yes": [a, b, c], "no": []} gives none at all, since
    the question would give the answer away.
    """
    piles = {answer: shuffled(questions, rng) for answer, questions in by_answer.items()}
    answers, asked = list(piles), []
    while piles and all(piles.values()):
        answer = pick(answers, rng)
        asked.append((piles[answer].pop(), answer))
    return asked


def ask_read(scene: Scene, rng: np.random.Generator) -> Asked:
    """The digit or word at a place."""
    return [
        (pick((f"What is written {at(t.place)}?", f"Which {t.kind} is {at(t.place)}?"), rng), t.name)
        for t in shuffled(scene.things, rng)
        if t.kind != "shape"
    ]


def ask_colour(scene: Scene, rng: np.random.Generator) -> Asked:
    """The colour of the thing at a place, or of a thing with a name of its own. Each thing is asked for once."""
    names = dict(plainly_named(scene))
    asked = []
    for thing in shuffled(scene.things, rng):
        by_name = thing in names and rng.random() < 0.5
        asked.append((f"What colour is {names[thing] if by_name else f'the thing {at(thing.place)}'}?", thing.colour))
    return asked


def ask_shape(scene: Scene, rng: np.random.Generator) -> Asked:
    """The shape at a place."""
    return [
        (pick((f"Which shape is {at(t.place)}?", f"What shape is the thing {at(t.place)}?"), rng), t.name)
        for t in shuffled(scene.things, rng)
        if t.kind == "shape"
    ]


def half_of(thing: Thing, axis: int, size: int) -> int:
    """Which half of the picture the thing is in along x (0) or y (1): 0 or 1, or -1 where that is not clear."""
    shift = thing.centre[axis] / size - 0.5
    return -1 if abs(shift) < CLEAR_HALF else int(shift > 0)


def ask_presence(scene: Scene, rng: np.random.Generator) -> Asked:
    """Whether a digit, shape or word is in a half of the picture.

    Two thirds of the negative answers are about things in the other half, so that knowing what exists is not enough.
    """
    piles: dict[str, list[str]] = {"yes": [], "no": []}
    for axis, sides in enumerate((("left", "right"), ("top", "bottom"))):
        found = defaultdict(set)
        for thing in scene.things:
            found[noun(thing)].add(half_of(thing, axis, scene.image.width))
        for half, word in enumerate(sides):
            for name, where in found.items():
                if where == {1 - half} or half in where:
                    piles["yes" if half in where else "no"].append(presence_text(name, word, rng))
    halves = ("left", "right", "top", "bottom")
    # Keys of a dict, not a set: no question twice, and the same order in every process.
    absent = dict.fromkeys((absent_name(scene, rng), pick(halves, rng)) for _ in range(len(piles["no"]) // 2))
    piles["no"] += [presence_text(name, half, rng) for name, half in absent]
    return fair(piles, rng)


def presence_text(name: str, half: str, rng: np.random.Generator) -> str:
    """Asks for a thing in a half: "Is there an 8 in the top half?"."""
    article = "the" if name.startswith("word") else "an" if name == "8" else "a"
    return f"{pick(('Is there', 'Do you see'), rng)} {article} {name} in the {half} half?"


def absent_name(scene: Scene, rng: np.random.Generator) -> str:
    """A thing that is absent, of a kind that is present, so that neither kind nor name gives it away."""
    there = {thing.name for thing in scene.things}
    kinds = [thing.kind for thing in scene.things if not there.issuperset(NAMES[thing.kind])]
    kind = pick(kinds or ("digit", "word"), rng)  # a picture of all the shapes lacks none
    name = pick([name for name in NAMES[kind] if name not in there], rng)
    return f"word {name}" if kind == "word" else name


def ask_count(scene: Scene, rng: np.random.Generator) -> Asked:
    """How many things there are, or of a kind; absent kinds half as often, or 0 would be a good guess."""
    counts = Counter(thing.kind for thing in scene.things)
    asked = [(count_text("thing", rng), str(len(scene.things)))]
    asked += [(count_text(kind, rng), str(counts[kind])) for kind in NAMES if counts[kind] or rng.random() < 0.5]
    return shuffled(asked, rng)


def count_text(kind: str, rng: np.random.Generator) -> str:
    """Asks how many there are of a kind, in one of two phrasings."""
    return pick((f"How many {kind}s are there?", f"Count the {kind}s."), rng)


def ask_count_colour(scene: Scene, rng: np.random.Generator) -> Asked:
    """How many things have a colour; only where one has two or more, or the answer would nearly always be 0 or 1."""
    counts = Counter(thing.colour for thing in scene.things)
    if max(counts.values()) < 2:
        return []
    piles = defaultdict(list)
    for colour in COLOURS:
        text = pick((f"How many things are {colour}?", f"How many {colour} things are there?"), rng)
        piles[str(counts[colour])].append(text)
    return fair(piles, rng)


def ask_majority(scene: Scene, rng: np.random.Generator) -> Asked:
    """The most common colour of three or more things, where there is only one."""
    ranked = Counter(thing.colour for thing in scene.things).most_common(2)
    if len(scene.things) < 3 or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return []
    return [(pick(("Which colour is most common?", "What is the most common colour?"), rng), ranked[0][0])]


def ask_relation(scene: Scene, rng: np.random.Generator) -> Asked:
    """Whether a thing is left of, right of, above or below another; each pair once for each axis."""
    asked = []
    for axis, words in enumerate((("left of", "right of"), ("above", "below"))):
        for (a, a_text), (b, b_text) in pairs_of(named(scene), rng):
            shift = a.centre[axis] - b.centre[axis]
            if abs(shift) > CLEAR_SHIFT * scene.image.width:
                word = pick(words, rng)
                asked.append((f"Is {a_text} {word} {b_text}?", yes_no((shift < 0) == (word == words[0]))))
    return shuffled(asked, rng)


def yes_no(truth: bool) -> str:
    """The answer to a question about a truth."""
    return "yes" if truth else "no"


def ask_compare(scene: Scene, rng: np.random.Generator) -> Asked:
    """Which of two things is taller, or has the same colour as another. Names only: a colour would be a hint."""
    colours = Counter(thing.colour for thing in scene.things)
    taller, alike = [], []
    for (a, a_text), (b, b_text) in pairs_of(plainly_named(scene), rng):
        clear = max(a.height, b.height) > CLEAR_RATIO * min(a.height, b.height)
        if clear and "word" not in (a.kind, b.kind):  # words are nearly always lower
            answer = max(a, b, key=lambda thing: thing.height)
            taller.append((f"Which is taller, {a_text} or {b_text}?", answer.name))
        if a.colour == b.colour and colours[a.colour] == 2:
            alike.append((f"Which thing has the same colour as {a_text}?", b.name))
    return taller + alike if rng.random() < 0.5 else alike + taller


def ask_where(scene: Scene, rng: np.random.Generator) -> Asked:
    """The place of a thing, or "nowhere" for one that is not there."""
    asked = [(f"Where is {text}?", thing.place) for thing, text in named(scene)]
    asked.append((f"Where is the {absent_name(scene, rng)}?", "nowhere"))
    return shuffled(asked, rng)


def ask_describe(scene: Scene, rng: np.random.Generator) -> Asked:
    """The whole picture, in reading order: "top left: red 7, centre: blue star"."""
    items = [f"{thing.place}: {thing.colour} {thing.name}" for thing in scene.things]
    return [(pick(("Describe the picture.", "What is in the picture?"), rng), ", ".join(items))]


@dataclass(frozen=True)
class Family:
    """A family of questions: the view it needs ("local", "regional", "global"), and how questions are made."""

    name: str
    group: str
    make: Callable[[Scene, np.random.Generator], Asked]

    def questions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        """The family's questions about the scene, in order; [] if the scene does not allow any."""
        return [Question(self.name, self.group, *asked) for asked in self.make(scene, rng)]


FAMILIES = {
    family.name: family
    for family in (
        Family("read", "local", ask_read),
        Family("colour", "local", ask_colour),
        Family("shape", "local", ask_shape),
        Family("presence", "regional", ask_presence),
        Family("where", "regional", ask_where),
        Family("relation", "regional", ask_relation),
        Family("compare", "regional", ask_compare),
        Family("count", "global", ask_count),
        Family("count_colour", "global", ask_count_colour),
        Family("majority", "global", ask_majority),
        Family("describe", "global", ask_describe),
    )
}


def ask(scene: Scene, split: str, index: int, count: int, families: Collection[str] | None = None) -> list[Question]:
    """`count` questions about scene `index`, drawn evenly from those families that still have one.

    Only when all have run out does it start again. Raises ValueError if no family fits the scene, which
    cannot happen where "colour", "count" or "describe" is among them.
    """
    rng = scene_rng(split, index, 1)
    piles: dict[str, list[Question]] = {}
    questions: list[Question] = []
    while len(questions) < count:
        piles = piles or make_piles(scene, families or FAMILIES, rng)
        family = pick(list(piles), rng)
        questions.append(piles[family].pop())
        if not piles[family]:
            del piles[family]
    return questions


def make_piles(scene: Scene, families: Collection[str], rng: np.random.Generator) -> dict[str, list[Question]]:
    """Each family's questions about the scene, the next one last; without families that have none."""
    piles = {family: FAMILIES[family].questions(scene, rng)[::-1] for family in families}
    piles = {family: asked for family, asked in piles.items() if asked}
    if not piles:
        raise ValueError(f"Scene {scene.seed_key} has no question of the families {', '.join(families)}.")
    return piles


def transcript(scene: Scene) -> str:
    """All nine places in reading order: "top left: red 7, top: nothing, ..."."""
    there = {thing.place: f"{thing.colour} {thing.name}" for thing in scene.things}
    return ", ".join(f"{place}: {there.get(place, 'nothing')}" for place in PLACES)


def height_step(thing: Thing, scene: Scene) -> int:
    """The thing's height in 32nds of the picture's, rounded down."""
    return thing.height * HEIGHTS // scene.image.height


def index_by_name(scene: Scene, rng: np.random.Generator) -> str:
    """Every name's place, colour and height, in random order, and up to three absent ones: "7 top left red 9, ..."."""
    items = [f"{t.name} {t.place} {t.colour} {height_step(t, scene)}" for t, _ in plainly_named(scene)]
    absent = dict.fromkeys(absent_name(scene, rng).removeprefix("word ") for _ in range(3))
    return ", ".join(shuffled([*items, *(f"{name} nothing" for name in absent)], rng))


def score(question: Question, reply: str) -> float:
    """1 if the reply is the answer, else 0; for "describe" the F1 of its items, 0 to 1.

    Case, a final stop and outer blanks do not count.
    """
    reply, answer = (text.strip().lower().removesuffix(".").strip() for text in (reply, question.answer))
    if question.family != "describe":
        return float(reply == answer)
    said, true = (Counter(" ".join(item.split()) for item in text.split(",")) for text in (reply, answer))
    return 2 * (said & true).total() / (said.total() + true.total())


# --- Records ----------------------------------------------------------------------------------------------------


def make_record(
    scene: Scene,
    turns: Iterable[tuple[str, str]],
    *,
    pictures: Sequence[Image.Image] | None = None,
    blind: bool = False,
) -> dict[str, Any]:
    """A conversation about a scene, or several `pictures`, in LLaVA's format; there are none if `blind`.

    <image> stands in the first turn only, once for each picture.
    """
    pictures = [] if blind else pictures or [scene.image]
    conversations = []
    for number, (question, answer) in enumerate(turns):
        start = "" if number else "<image>\n" * len(pictures)
        conversations.append({"from": "human", "value": f"{start}{question}"})
        conversations.append({"from": "gpt", "value": answer})
    image = pictures if len(pictures) > 1 else pictures[0] if pictures else None
    return {"id": "-".join(map(str, scene.seed_key)), "image": image, "conversations": conversations}
