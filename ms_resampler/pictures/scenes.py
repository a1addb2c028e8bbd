"""Composes cut-outs on a background, and measures how unevenly detail is spread over a picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 336  # side of a picture in pixels
CELLS = 6  # cells per side for measuring detail
GAP = 5  # pixels between two things

# Where things may be (left, top, right, bottom) and how large they are (square root of their area), in picture widths.
LAYOUTS = {
    "full": ((0.02, 0.02, 0.98, 0.98), (0.17, 0.3)),
    "corner": ((0.0, 0.0, 0.5, 0.5), (0.1, 0.14)),
    "margin": ((0.02, 0.02, 0.98, 0.98), (0.12, 0.17)),
    "small": ((0.05, 0.05, 0.95, 0.95), (0.065, 0.09)),
}

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A picture, the boxes of its things in pixels, in order, its layout and its background."""

    image: Image.Image
    boxes: tuple[Box, ...]
    layout: str
    ground: str


def pick(items: Sequence, rng: np.random.Generator):
    """One of the items."""
    return items[int(rng.integers(len(items)))]


def compose(cutouts: Sequence[Image.Image], rng: np.random.Generator, layouts: Sequence[str] = tuple(LAYOUTS)) -> Scene:
    """Places cut-outs (RGBA) on a background without overlap; "small" things have a plain background."""
    layout = pick(layouts, rng)
    ground = "plain" if layout == "small" else pick(list(GROUNDS), rng)
    image = draw_ground(ground, rng)
    flip = rng.integers(2, size=2)
    boxes: list[Box] = []
    shrink = 1.0
    while len(boxes) < len(cutouts):
        thing = cutouts[len(boxes)]
        box = None
        for _ in range(60):
            box = free_box(thing, layout, shrink, flip, boxes, rng)
            if box:
                break
        if box:
            boxes.append(box)
        else:  # too large to fit: start again with smaller things
            boxes, shrink = [], shrink * 0.92
    for thing, (left, top, right, bottom) in zip(cutouts, boxes, strict=True):
        image.paste(sized := thing.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top), sized)
    return Scene(image, tuple(boxes), layout, ground)


def free_box(
    thing: Image.Image, layout: str, shrink: float, flip: np.ndarray, taken: Sequence[Box], rng: np.random.Generator
) -> Box | None:
    """A random box for a thing; None if it would touch another one or leave the layout's area."""
    area, sizes = LAYOUTS[layout]
    left, top, right, bottom = (round(SIDE * part) for part in area)
    if flip[0]:
        left, right = SIDE - right, SIDE - left
    if flip[1]:
        top, bottom = SIDE - bottom, SIDE - top
    scale = SIDE * rng.uniform(*sizes) * shrink / (thing.width * thing.height) ** 0.5
    width, height = max(8, round(thing.width * scale)), max(8, round(thing.height * scale))
    if width > right - left or height > bottom - top:
        return None
    x, y = int(rng.integers(left, right - width + 1)), int(rng.integers(top, bottom - height + 1))
    if layout == "margin":  # at one of the four edges
        edge = int(rng.integers(4))
        x, y = ((left, y), (right - width, y), (x, top), (x, bottom - height))[edge]
    box = (x, y, x + width, y + height)
    return None if any(touch(box, other) for other in taken) else box


def touch(a: Box, b: Box, gap: int = GAP) -> bool:
    """Whether two boxes are closer than `gap` pixels."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def unevenness(image: Image.Image) -> float:
    """The share of all detail (changes of brightness) in the busiest quarter of the cells: 0.25 (even) to 1."""
    grey = np.asarray(image.convert("L").resize((16 * CELLS, 16 * CELLS), Image.Resampling.BILINEAR), dtype=np.float64)
    detail = np.hypot(*np.gradient(grey))
    cells = np.sort(detail.reshape(CELLS, 16, CELLS, 16).sum((1, 3)), axis=None)
    return float(cells[-(CELLS**2 // 4) :].sum() / max(cells.sum(), 1e-9))


def spread(image: Image.Image) -> dict[str, float | str]:
    """The meta fields on how evenly detail is spread over a picture."""
    share = unevenness(image)
    return {"unevenness": round(share, 3), "detail": ["even", "uneven", "very uneven"][(share > 0.45) + (share > 0.7)]}


# Backgrounds ----------------------------------------------------------------------------------------------------------


def draw_ground(name: str, rng: np.random.Generator) -> Image.Image:
    """A background in two random similar colours."""
    first = rng.uniform(90, 250, 3)
    second = np.clip(first + rng.uniform(-45, 45, 3), 0, 255)
    mix = np.clip(GROUNDS[name](rng), 0, 1)[..., None]
    return Image.fromarray((first * (1 - mix) + second * mix).astype(np.uint8))


def grid() -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of all pixels, from 0 to 1."""
    rows, columns = np.mgrid[:SIDE, :SIDE] / SIDE
    return rows, columns


def plain(rng: np.random.Generator) -> np.ndarray:
    """One colour."""
    return np.zeros((SIDE, SIDE))


def gradient(rng: np.random.Generator) -> np.ndarray:
    """From one colour to the other, along a random direction."""
    rows, columns = grid()
    angle = rng.uniform(0, 2 * np.pi)
    return 0.5 + (rows - 0.5) * np.sin(angle) + (columns - 0.5) * np.cos(angle)


def stripes(rng: np.random.Generator) -> np.ndarray:
    """Straight stripes of a random direction and width."""
    return (gradient(rng) * rng.integers(5, 16) % 1 > 0.5).astype(float)


def checks(rng: np.random.Generator) -> np.ndarray:
    """A chessboard."""
    rows, columns = grid()
    count = rng.integers(5, 14)
    return ((rows * count).astype(int) + (columns * count).astype(int)) % 2.0


def clouds(rng: np.random.Generator) -> np.ndarray:
    """Soft noise at three scales."""
    layers = [
        np.asarray(
            Image.fromarray(rng.random((n, n)).astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        )
        for n in (4, 9, 24)
    ]
    return 0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]


def grain(rng: np.random.Generator) -> np.ndarray:
    """Fine noise, as of sand."""
    return rng.random((SIDE, SIDE)) * 0.6


def blots(rng: np.random.Generator) -> np.ndarray:
    """Discs of many sizes with soft edges."""
    image = Image.new("L", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    for x, y, r in zip(*(rng.integers(0, SIDE, (2, 30))), rng.integers(5, 30, 30), strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.integers(90, 256)))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2))) / 255


GROUNDS = {
    "plain": plain,
    "gradient": gradient,
    "stripes": stripes,
    "checks": checks,
    "clouds": clouds,
    "grain": grain,
    "blots": blots,
}
