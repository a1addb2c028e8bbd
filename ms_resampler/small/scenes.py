"""Pictures to learn from: drawings of the model's nouns, one or several, on plain and patterned grounds.

Drawings come from packages of npm (emoji in five styles), and on Debian from `openclipart-svg`. The style
fluent-emoji-3d is kept aside for tests, openmoji for validation.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from ..pictures.scenes import GROUNDS, draw_ground, touch
from ..pictures.sources import Shelf, cutout
from .parts import SIDE, things

STYLES = {
    "train": ("noto", "noto-v1", "twemoji", "emojione", "fxemoji", "openclipart"),
    "validation": ("openmoji",),
    "test-style": ("fluent-emoji-3d",),
}
GAP = 3  # pixels between two things
# The size of things in a picture of 1, 2, 4 and more: square root of the area, in picture widths.
SIZES = ((1, (0.42, 0.92)), (2, (0.3, 0.47)), (4, (0.24, 0.42)), (9, (0.2, 0.32)))

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawing:
    """A picture of a noun: an SVG text or a file."""

    noun: str
    style: str
    source: str | Path


@dataclass(frozen=True)
class Scene:
    """A picture, and the noun and the box (left, top, right, bottom; in picture widths) of each thing in it."""

    image: Image.Image
    nouns: tuple[str, ...]
    boxes: tuple[Box, ...]


def find_drawings(shelf: Shelf) -> dict[str, dict[str, list[Drawing]]]:
    """Drawings by split and noun."""
    clipart = shelf.debian("openclipart-svg")
    found: dict[str, dict[str, list[Drawing]]] = {split: defaultdict(list) for split in STYLES}
    emoji = {entry["label"]: entry for entry in shelf.read("emojibase-data", "en/data.json")}
    for split, styles in STYLES.items():
        for noun, known in things().items():
            for entry in (emoji[label] for label in known.get("emoji", [])):
                for style in styles:
                    source: str | Path | None = None
                    if style == "fluent-emoji-3d":
                        source = shelf.render(entry["hexcode"].lower())
                    elif style != "openclipart":
                        source = shelf.svg_of(entry, shelf.icons(style))
                    if source is not None:
                        found[split][noun].append(Drawing(noun, style, source))
            if clipart is not None and "openclipart" in styles:
                for name in known.get("clipart", []):
                    found[split][noun].append(
                        Drawing(noun, "openclipart", clipart / "usr/share/openclipart/svg" / name)
                    )
    return {split: dict(nouns) for split, nouns in found.items()}


class Painter:
    """Draws the scene of any number, always the same one, of a split's drawings.

    Half of all scenes have one thing, most others two to four different ones, and the rest one thing several times.
    Nouns with more drawings come more often.
    """

    def __init__(self, drawings: dict[str, list[Drawing]], split: str):
        self.drawings = drawings
        self.split = split
        self.nouns = [noun for noun in things() if noun in drawings]
        self.weights = [min(len(drawings[noun]), 16) ** 0.5 for noun in self.nouns]

    def choose(self, number: int) -> list[Drawing]:
        """The things of a scene."""
        rng = random.Random(f"{self.split} {number}")
        kind = rng.random()
        if kind < 0.5:
            return [self.draw(rng)]
        chosen: list[Drawing] = []
        if kind < 0.85:
            count = rng.choices((2, 3, 4), (0.5, 0.3, 0.2))[0]
        else:
            chosen, count = [self.draw(rng)] * rng.randint(2, 5), 1
            if len(chosen) < 5 and rng.random() < 0.4:
                count = 2
        while len({drawing.noun for drawing in chosen}) < count:
            drawing = self.draw(rng)
            if all(drawing.noun != other.noun for other in chosen):
                chosen.append(drawing)
        return chosen

    def draw(self, rng: random.Random) -> Drawing:
        """A random drawing of a random noun."""
        return rng.choice(self.drawings[rng.choices(self.nouns, self.weights)[0]])

    def scene(self, number: int) -> Scene:
        """The scene of a number; in training, drawings are also turned, and their colours changed."""
        chosen = self.choose(number)
        rng = random.Random(f"{self.split} {number} look")
        return compose(chosen, [changed(drawing, rng, self.split == "train") for drawing in chosen], rng)


def changed(drawing: Drawing, rng: random.Random, much: bool) -> Image.Image:
    """A drawing's cut-out (RGBA), mirrored half of the time, and turned and recoloured if `much`."""
    image = load(drawing)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not much:
        return image
    if rng.random() < 0.35:
        image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)
    colours = image.convert("RGB")
    for enhance, share, least, most in (
        (ImageEnhance.Color, 0.5, 0.2, 1.5),
        (ImageEnhance.Brightness, 0.5, 0.7, 1.25),
        (ImageEnhance.Contrast, 0.3, 0.6, 1.3),
    ):
        if rng.random() < share:
            colours = enhance(colours).enhance(rng.uniform(least, most))
    colours.putalpha(image.getchannel("A"))
    return colours


def load(drawing: Drawing) -> Image.Image:
    """A drawing as a cut-out (RGBA)."""
    if isinstance(drawing.source, Path) and drawing.source.suffix == ".svg":
        return cutout(drawing.source.read_text(encoding="utf-8", errors="replace"))
    return cutout(drawing.source)


def compose(chosen: Sequence[Drawing], cutouts: Sequence[Image.Image], rng: random.Random) -> Scene:
    """Cut-outs without overlap on a ground: white for three scenes of ten."""
    if rng.random() < 0.3:
        image = Image.new("RGB", (SIDE, SIDE), "white")
    else:
        name = rng.choice(list(GROUNDS)) if rng.random() < 0.6 else rng.choice(["plain", "gradient"])
        ground = draw_ground(name, np.random.default_rng(rng.getrandbits(32)))
        image = ground.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    boxes = place(cutouts, rng)
    for cut, box in zip(cutouts, boxes, strict=True):
        sized = cut.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
        image.paste(sized, box[:2], sized)
    return Scene(
        image,
        tuple(drawing.noun for drawing in chosen),
        tuple((x0 / SIDE, y0 / SIDE, x1 / SIDE, y1 / SIDE) for x0, y0, x1, y1 in boxes),
    )


def place(cutouts: Sequence[Image.Image], rng: random.Random) -> list[tuple[int, int, int, int]]:
    """Random boxes in pixels that do not touch; all shrink until they fit."""
    least, most = next(sizes for count, sizes in SIZES if len(cutouts) <= count)
    shrink = 1.0
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for cut in cutouts:
            for _ in range(40):
                side = SIDE * rng.uniform(least, most) * shrink
                scale = min(side / (cut.width * cut.height) ** 0.5, 0.98 * SIDE / max(cut.size))
                width, height = max(8, int(cut.width * scale)), max(8, int(cut.height * scale))
                x, y = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
                box = (x, y, x + width, y + height)
                if not any(touch(box, other, GAP) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(cutouts):
            return boxes
        shrink *= 0.94
