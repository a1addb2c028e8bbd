"""Scenes: small pictures of handwritten digits, shapes and words, with questions whose answers are known.

Everything follows from (split, index). Digit images are shared out between the splits, so that a digit seen
in training is never asked about in a test.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLOURS = {
    "red": (226, 52, 48),
    "orange": (255, 145, 20),
    "yellow": (250, 225, 40),
    "green": (40, 180, 75),
    "blue": (60, 120, 245),
    "purple": (175, 80, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
WORDS = ("cat", "sun", "key", "box", "map", "ice", "fly", "toy", "egg", "bus", "hat", "owl")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
PLACES = tuple(f"{row} {column}".strip() or "centre" for row in ROWS for column in COLUMNS)
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}

KIND_ODDS = {"digit": 0.4, "shape": 0.35, "word": 0.25}
THEME_ODDS = 0.45  # how often a thing takes the scene's main colour, so that majorities and pairs exist
CELL_MARGIN = 0.03  # of the picture's width: a thing's centre is never nearer to the border of a cell
CLEAR_SHIFT = 0.1  # of the picture's width: "left of" is asked only beyond it
CLEAR_RATIO = 1.35  # of sizes: "larger" is asked only beyond it


@dataclass(frozen=True)
class Thing:
    """A digit, shape or word. `box` is (left, top, right, bottom) in pixels; `cell` is its place, row by row."""

    kind: str
    name: str
    colour: str
    box: tuple[int, int, int, int]
    cell: int

    @property
    def place(self) -> str:
        """In words: "top left", "centre", ..."""
        return PLACES[self.cell]

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self) -> int:
        """The longer side in pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """A picture and what is on it, in reading order of the nine places."""

    image: Image.Image
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Question:
    """A question of a family, whose answer needs a local, regional or global look."""

    family: str
    group: str
    question: str
    answer: str


# --- Drawing -------------------------------------------------------------------------------------------------


@lru_cache
def digit_images(split: str) -> dict[str, list[np.ndarray]]:
    """Handwritten 8 x 8 digits of a split, by name; each class is shared out in the proportions of SPLITS."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("The scenes need scikit-learn's digits: pip install 'ms-resampler[train]'.") from None
    digits = load_digits()
    start = sum(share for name, share in SPLITS.items() if list(SPLITS).index(name) < list(SPLITS).index(split))
    images = {}
    for name in range(10):
        of_class = digits.images[digits.target == name] / 16
        images[str(name)] = list(of_class[int(start * len(of_class)) : int((start + SPLITS[split]) * len(of_class))])
    return images


@lru_cache(maxsize=None)
def shape_mask(name: str, size: int) -> Image.Image:
    """A filled shape, white on black, drawn four times larger and scaled down for smooth edges."""
    side = 4 * size
    mask = Image.new("L", (side, side))
    draw, end = ImageDraw.Draw(mask), side - 1
    if name == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif name == "square":
        draw.rectangle((side // 12, side // 12, end - side // 12, end - side // 12), fill=255)
    elif name == "triangle":
        draw.polygon(((side // 2, 0), (end, end), (0, end)), fill=255)
    elif name == "cross":
        draw.rectangle((side * 3 // 8, 0, side * 5 // 8, end), fill=255)
        draw.rectangle((0, side * 3 // 8, end, side * 5 // 8), fill=255)
    elif name == "ring":
        draw.ellipse((0, 0, end, end), outline=255, width=side // 5)
    else:  # star
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, side / 2, side / 4.6)
        corners = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1) + side / 2
        draw.polygon([tuple(corner) for corner in corners], fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


@lru_cache(maxsize=None)
def word_mask(word: str, size: int) -> Image.Image:
    """A word as wide as `size` pixels, white on black."""
    font = ImageFont.load_default(48)
    left, top, right, bottom = font.getbbox(word)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font, stroke_width=1)
    return mask.resize((size, max(8, round(size * mask.height / mask.width))), Image.Resampling.BOX)


def digit_mask(pixels: np.ndarray, size: int) -> Image.Image:
    """A handwritten digit of `size` x `size` pixels, smooth but with firm strokes."""
    smooth = Image.fromarray((pixels * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return smooth.point([int(np.clip((value - 50) * 1.9, 0, 255)) for value in range(256)])


def background(size: int, rng: np.random.Generator) -> tuple[Image.Image, bool]:
    """A plain, graded, noisy, striped or dotted paper, dark or light; and whether it is light."""
    light = bool(rng.random() < 0.5)
    base = rng.uniform(215, 248, 3) if light else rng.uniform(8, 48, 3)
    rows, columns = np.mgrid[0:size, 0:size] / size
    style = rng.integers(5)
    texture = np.zeros((size, size))
    if style == 1:
        angle = rng.uniform(0, 2 * np.pi)
        texture = 30 * (np.cos(angle) * rows + np.sin(angle) * columns)
    elif style == 2:
        texture = rng.normal(0, 5, (size, size))
    elif style == 3:
        texture = 7 * np.sign(np.sin((rows * rng.uniform(0, 1) + columns) * rng.uniform(30, 60)))
    elif style == 4:
        frequency = rng.uniform(30, 50)
        texture = 14 * (np.sin(rows * frequency) * np.sin(columns * frequency) > 0.6)
    pixels = base + (texture if not light else -texture)[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), light


def paint(picture: Image.Image, mask: Image.Image, colour: str, corner: tuple[int, int], light: bool) -> None:
    """Pastes a thing in its colour; on light paper with a dark rim, or yellow would vanish."""
    if light:
        rim = Image.new("L", (mask.width + 2, mask.height + 2))
        rim.paste(mask, (1, 1))
        rim = rim.filter(ImageFilter.MaxFilter(3)).point([int(0.7 * value) for value in range(256)])
        picture.paste((20, 20, 25), (corner[0] - 1, corner[1] - 1), rim)
    picture.paste(COLOURS[colour], corner, mask)


# --- Scenes --------------------------------------------------------------------------------------------------


def make_scene(split: str, index: int, *, max_things: int = 6, size: int = 96) -> Scene:
    """Scene number `index` of a split: 1 to `max_things` things on a paper of `size` x `size` pixels."""
    rng = scene_rng(split, index, 0)
    picture, light = background(size, rng)
    theme = rng.choice(list(COLOURS))
    things: list[Thing] = []
    for cell in rng.permutation(9)[: rng.integers(1, max_things + 1)]:
        kind = str(rng.choice(list(KIND_ODDS), p=list(KIND_ODDS.values())))
        colour = str(theme if rng.random() < THEME_ODDS else rng.choice(list(COLOURS)))
        name, mask = draw_thing(kind, split, size, rng)
        corner = find_corner(mask.size, int(cell), size, [thing.box for thing in things], rng)
        if corner is None:
            continue  # a crowded corner: the scene has one thing fewer
        paint(picture, mask, colour, corner, light)
        box = (*corner, corner[0] + mask.width, corner[1] + mask.height)
        things.append(Thing(kind, name, colour, box, int(cell)))
    return Scene(picture, tuple(sorted(things, key=lambda thing: thing.cell)))


def scene_rng(split: str, index: int, stream: int) -> np.random.Generator:
    """The generator of one scene; stream 0 draws the scene, stream 1 its questions."""
    return np.random.default_rng([list(SPLITS).index(split), index, stream])


def draw_thing(kind: str, split: str, size: int, rng: np.random.Generator) -> tuple[str, Image.Image]:
    """A random thing of a kind: its name and its mask."""
    side = int(rng.uniform(0.21, 0.34) * size)
    if kind == "digit":
        name = str(rng.integers(10))
        images = digit_images(split)[name]
        return name, digit_mask(images[rng.integers(len(images))], side)
    if kind == "shape":
        name = str(rng.choice(SHAPES))
        return name, shape_mask(name, side)
    name = str(rng.choice(WORDS))
    return name, word_mask(name, int(rng.uniform(0.29, 0.36) * size))


def find_corner(
    sides: tuple[int, int], cell: int, size: int, taken: list[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Where to put a thing so that its centre is inside the cell and it touches nothing; None after 20 tries."""
    row, column = divmod(cell, 3)
    ranges = []
    for number, side in ((column, sides[0]), (row, sides[1])):
        low = max((number / 3 + CELL_MARGIN) * size, side / 2 + 1)
        high = min(((number + 1) / 3 - CELL_MARGIN) * size, size - side / 2 - 1)
        ranges.append((low, high))
    for _ in range(20):
        left, top = (round(rng.uniform(*span) - side / 2) for span, side in zip(ranges, sides, strict=True))
        box = (left - 1, top - 1, left + sides[0] + 1, top + sides[1] + 1)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            return left, top
    return None


# --- Questions: every family makes (question, answer), or None where a scene does not allow it ----------------

Asked = tuple[str, str] | None


def phrase_place(place: str) -> str:
    """"top left" -> "at the top left", "centre" -> "in the centre"."""
    return "in the centre" if place == "centre" else f"at the {place}"


def reference(thing: Thing, scene: Scene) -> str | None:
    """How to call a thing unambiguously by its name, with its colour if needed: "the red circle"."""
    noun = f"word {thing.name}" if thing.kind == "word" else thing.name
    if sum(other.name == thing.name for other in scene.things) == 1:
        return f"the {noun}"
    if sum((other.name, other.colour) == (thing.name, thing.colour) for other in scene.things) == 1:
        return f"the {thing.colour} {noun}"
    return None


def pick(items: list, rng: np.random.Generator):
    """One of the items, None if there are none."""
    return items[rng.integers(len(items))] if items else None


def ask_read(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = pick([t for t in scene.things if t.kind != "shape"], rng)
    if thing is None:
        return None
    noun = "Which digit is" if thing.kind == "digit" else "Which word is"
    start = pick([noun, "What is written"], rng)
    return f"{start} {phrase_place(thing.place)}?", thing.name


def ask_colour(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = pick(list(scene.things), rng)
    unique = sum(other.name == thing.name for other in scene.things) == 1
    if unique and rng.random() < 0.5:
        return f"What colour is {reference(thing, scene)}?", thing.colour
    return f"What colour is the thing {phrase_place(thing.place)}?", thing.colour


def ask_shape(scene: Scene, rng: np.random.Generator) -> Asked:
    thing = pick([t for t in scene.things if t.kind == "shape"], rng)
    return thing and (f"Which shape is {phrase_place(thing.place)}?", thing.name)


def ask_presence(scene: Scene, rng: np.random.Generator) -> Asked:
    """Yes and no equally often; half of the no's name a thing that is elsewhere, half one that is nowhere."""
    bands = {"top row": (0, 1, 2), "bottom row": (6, 7, 8), "left column": (0, 3, 6), "right column": (2, 5, 8)}
    band, yes = str(rng.choice(list(bands))), rng.random() < 0.5
    inside = {t.name for t in scene.things if t.cell in bands[band]}
    elsewhere = sorted({t.name for t in scene.things} - inside)
    absent = sorted({*map(str, range(10)), *SHAPES, *WORDS} - {t.name for t in scene.things})
    if not inside:
        return None  # with only no's to give, the answer would not be balanced
    name = pick(sorted(inside) if yes else elsewhere if elsewhere and rng.random() < 0.5 else absent, rng)
    noun = f"the word {name}" if name in WORDS else f"an {name}" if name == "8" else f"a {name}"
    return f"Is there {noun} in the {band}?", "yes" if yes else "no"


def ask_count(scene: Scene, rng: np.random.Generator) -> Asked:
    kind = pick([None, None, *KIND_ODDS], rng)
    if kind is None:
        return "How many things are there?", str(len(scene.things))
    return f"How many {kind}s are there?", str(sum(thing.kind == kind for thing in scene.things))


def ask_count_colour(scene: Scene, rng: np.random.Generator) -> Asked:
    counts = Counter(thing.colour for thing in scene.things)
    if max(counts.values()) < 2:
        return None  # only 0 and 1 could be asked for, too easy a guess
    wanted = pick(sorted({counts[colour] for colour in COLOURS}), rng)
    colour = pick([colour for colour in COLOURS if counts[colour] == wanted], rng)
    return f"How many things are {colour}?", str(wanted)


def ask_majority(scene: Scene, rng: np.random.Generator) -> Asked:
    ranked = Counter(thing.colour for thing in scene.things).most_common(2)
    if len(scene.things) < 3 or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return "Which colour is most common?", ranked[0][0]


def ask_relation(scene: Scene, rng: np.random.Generator) -> Asked:
    axis, (before, after) = pick([(0, ("left of", "right of")), (1, ("above", "below"))], rng)
    clear = CLEAR_SHIFT * scene.image.width
    pairs = [
        (a, b)
        for a in scene.things
        for b in scene.things
        if abs(a.centre[axis] - b.centre[axis]) > clear and reference(a, scene) and reference(b, scene)
    ]
    if not pairs:
        return None
    a, b = pick(pairs, rng)
    word = pick([before, after], rng)
    answer = (a.centre[axis] < b.centre[axis]) == (word == before)
    return f"Is {reference(a, scene)} {word} {reference(b, scene)}?", "yes" if answer else "no"


def ask_compare(scene: Scene, rng: np.random.Generator) -> Asked:
    named = [thing for thing in scene.things if reference(thing, scene)]
    pairs = [(a, b) for a in named for b in named if a is not b]
    if rng.random() < 0.3:
        return ask_larger(scene, pairs, rng)
    same = [(a, b) for a, b in pairs if a.colour == b.colour and a.name != b.name]
    different = [(a, b) for a, b in pairs if a.colour != b.colour and a.name != b.name]
    if not same or not different:
        return None  # only where both answers could be asked for, so that they are balanced
    yes = rng.random() < 0.5
    a, b = pick(same if yes else different, rng)
    question = f"Do {reference(a, scene)} and {reference(b, scene)} have the same colour?"
    return question, "yes" if yes else "no"


def ask_larger(scene: Scene, pairs: list[tuple[Thing, Thing]], rng: np.random.Generator) -> Asked:
    pairs = [
        (a, b)
        for a, b in pairs
        if "word" not in (a.kind, b.kind)
        and a.name != b.name
        and max(a.size / b.size, b.size / a.size) > CLEAR_RATIO
    ]
    if not pairs:
        return None
    a, b = pick(pairs, rng)
    larger = a if a.size > b.size else b
    return f"Which is larger, {reference(a, scene)} or {reference(b, scene)}?", larger.name


def ask_describe(scene: Scene, rng: np.random.Generator) -> Asked:
    items = [f"{thing.place}: {thing.colour} {thing.name}" for thing in scene.things]
    return pick(["Describe the picture.", "What is in the picture?"], rng), ", ".join(items)


FAMILIES: dict[str, tuple[str, Callable[[Scene, np.random.Generator], Asked]]] = {
    "read": ("local", ask_read),
    "colour": ("local", ask_colour),
    "shape": ("local", ask_shape),
    "presence": ("regional", ask_presence),
    "relation": ("regional", ask_relation),
    "compare": ("regional", ask_compare),
    "count": ("global", ask_count),
    "count colour": ("global", ask_count_colour),
    "majority": ("global", ask_majority),
    "describe": ("global", ask_describe),
}


def ask(scene: Scene, split: str, index: int, count: int, families: list[str] | None = None) -> list[Question]:
    """`count` questions about scene `index`, families evenly among those that the scene allows."""
    rng = scene_rng(split, index, 1)
    questions: list[Question] = []
    while len(questions) < count:
        family = str(pick(families or list(FAMILIES), rng))
        group, make = FAMILIES[family]
        asked = make(scene, rng)
        if asked is not None:
            questions.append(Question(family, group, *asked))
    return questions


def transcript(scene: Scene) -> str:
    """All nine places in reading order: "top left: red 7, top: nothing, ..."."""
    by_cell = {thing.cell: f"{thing.colour} {thing.name}" for thing in scene.things}
    return ", ".join(f"{place}: {by_cell.get(cell, 'nothing')}" for cell, place in enumerate(PLACES))


def score(question: Question, reply: str) -> float:
    """1 if the reply is the answer, else 0; for "describe" the F1 of its items. Case and a final stop do not count."""
    reply = reply.strip().lower().removesuffix(".")
    if question.family != "describe":
        return float(reply == question.answer)
    said, true = (Counter(item.strip() for item in text.split(",")) for text in (reply, question.answer))
    hits = sum((said & true).values())
    return 2 * hits / (sum(said.values()) + sum(true.values()))
