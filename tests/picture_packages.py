"""Small packages in the layout of the real ones: flat shapes, one colour a noun, square countries, made-up tables."""

import csv
import json
from itertools import product
from pathlib import Path

from matplotlib import get_data_path, rc_context
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from PIL import Image

from ms_resampler.pictures.packages import PACKAGES
from ms_resampler.pictures.sources import FONTS, MANUALS, RANKS, SUITS, TABLES

NOUNS = (
    "monkey",
    "violin",
    "jar",
    "axe",
    "crocodile",
    "bus",
    "hook",
    "hedgehog",
    "sloth",
    "factory",
    "chestnut",
    "shield",
    "lollipop",
    "penguin",
    "taco",
    "flamingo",
    "giraffe",
    "lemon",
    "zebra",
    "hammer",
    "pencil",
    "robot",
    "banjo",
    "owl",
    "kimono",
    "camera",
    "whale",
    "tractor",
    "pizza",
    "guitar",
    "onion",
    "kite",
    "pear",
    "wolf",
    "crab",
    "tulip",
    "syringe",
    "rocket",
    "turtle",
    "canoe",
    "magnet",
    "broom",
    "koala",
)
THEMES = {"34": "animal-mammal", "42": "food-fruit", "78": "tool"}
# No ground is without red, so these colours are the nouns' alone.
COLOURS = dict(zip(NOUNS, ((0, 40 * green, 30 * blue) for green, blue in product(range(6), range(8))), strict=False))
SQUARE = 10  # degrees of a country's side


def make_packages(root: Path) -> Path:
    """All packages, below `root`."""
    for name, package in PACKAGES.items():
        write(root / name / "package.json", {"name": name, "version": package.version})
    emoji = [
        {"label": noun, "hexcode": f"1F{number:03}", "subgroup": int(theme), "tags": []}
        for number, (noun, theme) in enumerate(zip(NOUNS, list(THEMES) * len(NOUNS), strict=False))
    ]
    write(root / "emojibase-data/en/data.json", emoji)
    write(root / "emojibase-data/meta/groups.json", {"subgroups": THEMES})
    suits = {f"{suit.removesuffix('s')}-suit": {"body": square("black")} for suit in SUITS}
    nouns = {noun: {"body": square(f"rgb{COLOURS[noun]}")} for noun in NOUNS}
    for style in ("noto", "twemoji", "emojione", "fxemoji", "openmoji"):
        write(root / f"@iconify-json/{style}/icons.json", {"icons": suits | nouns, "width": 64, "height": 64})
    for entry in emoji:
        path = root / f"@lobehub/fluent-emoji-3d/assets/{entry['hexcode'].lower()}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (64, 64), (*COLOURS[entry["label"]], 255)).save(path, lossless=True)
    cards = {}
    for (number, rank), suit in product(enumerate(RANKS, 1), SUITS):
        cards[f"card-{number if 1 < number < 11 else rank}-{suit}"] = {"body": square("currentColor")}
        path = root / f"svg-cards/png/1x/{suit.removesuffix('s')}_{rank if number > 10 else number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (18, 24), "white").save(path)
    write(root / "@iconify-json/game-icons/icons.json", {"icons": cards, "width": 64, "height": 64})
    font = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf").read_bytes()
    for name in (*FONTS["train"], *FONTS["new"]):
        path = root / f"@fontsource/{name}/files/{name}-latin-400-normal.woff"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(font)
    words = ["".join(letters) for letters in product("bdgk", "aeio", "lmnrst", "aeu")]
    write(root / "an-array-of-english-words/index.json", words)
    for number in range(30):
        text = " ".join(f"{word} {number}" for word in words[number : number + 200])
        write(root / f"spdx-license-list/licenses/L{number}.json", {"name": f"Licence {number}", "licenseText": text})
    write(root / "world-atlas/countries-50m.json", topology("countries", "Land"))
    write(root / "us-atlas/states-10m.json", topology("states", "State"))
    for file, title, key, columns in TABLES:
        rows = [{key: f"{title[:8]} {row}", **dict.fromkeys(columns, 10 * row)} for row in range(1, 10)]
        path = root / "vega-datasets/data" / file
        write(path, rows)
        if path.suffix == ".csv":
            with path.open("w", newline="") as table:
                writer = csv.DictWriter(table, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    for manual in (*MANUALS["train"], *MANUALS["new"]):
        write_manual(root / f"debian/{manual}/manual.pdf")
    return root


def write_manual(path: Path) -> None:
    """Twelve pages of a line for each noun, in its colour: "monkey on page 3"."""
    path.parent.mkdir(parents=True)
    with rc_context({"pdf.fonttype": 42}), PdfPages(path) as pdf:
        for page in range(12):
            figure = Figure(figsize=(6, 8))
            for number, noun in enumerate(NOUNS[:30]):
                colour = [part / 255 for part in COLOURS[noun]]
                figure.text(0.1, 0.95 - 0.03 * number, f"{noun} on page {page}", size=14, color=colour)
            pdf.savefig(figure)


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def square(colour: str) -> str:
    return f'<rect x="8" y="8" width="48" height="48" fill="{colour}"/>'


def topology(layer: str, name: str) -> dict:
    """A chessboard of countries: "Land 3 5" is the third from the west and the fifth from the south."""
    side = SQUARE if name == "Land" else SQUARE // 2
    corners = [(side * column, side * row) for column, row in product(range(-4, 5), repeat=2)]
    ring = [[side, 0], [0, side], [-side, 0], [0, -side]]
    shapes = [
        {
            "type": "Polygon",
            "arcs": [[number]],
            "properties": {"name": f"{name} {x // side + 5} {y // side + 5}"},
        }
        for number, (x, y) in enumerate(corners)
    ]
    return {
        "transform": {"scale": [1, 1], "translate": [0, 0]},
        "arcs": [[[x, y], *ring] for x, y in corners],
        "objects": {layer: {"geometries": shapes}},
    }
