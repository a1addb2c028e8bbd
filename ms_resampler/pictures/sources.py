"""What pictures are made of: nouns drawn in several styles, cards, fonts, words, texts, tables, maps and pages.

Content (a noun, a word, a text, a table, a region, a card, a page) and look (a drawing style, a font, a deck, a
palette, a set of manuals) are each either for training or held out, by their names alone, whatever the seed.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .packages import debian_folder, package_folder
from .pages import open_pdf

STYLES = {"train": ("noto", "twemoji", "emojione", "fxemoji"), "new": ("fluent-emoji-3d", "openmoji")}
FONTS = {
    "train": ("roboto", "lora", "oswald", "merriweather", "nunito", "roboto-mono"),
    "new": ("caveat", "special-elite", "playfair-display", "bangers"),
}
DECKS = {"train": ("game-icons", "twemoji", "noto"), "new": ("svg-cards",)}
PLOTS = {"train": ("default", "ggplot", "bmh"), "new": ("fivethirtyeight", "dark_background", "Solarize_Light2")}
PALETTES = {"train": ("Pastel1", "Set3", "tab20"), "new": ("Paired", "tab20b")}
MANUALS = {"train": ("xorg-docs", "mpich-doc"), "new": ("debian-policy", "developers-reference")}
LOOKS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "styles": STYLES,
    "fonts": FONTS,
    "decks": DECKS,
    "plots": PLOTS,
    "palettes": PALETTES,
    "manuals": MANUALS,
}

# Themes of emoji whose names are names of things.
THEMES = re.compile(
    "animal-|plant-|food-|drink|dishware|place-building|transport-(ground|water|air)|sport|clothing|musical-instrument"
    "|phone|computer|light-video|writing|office|tool|science|medical|household|other-object"
)
# Words of names that are no single thing to count: masses, pairs, states, or parts.
UNCOUNTED = """
    bacon badminton beans blood bowling boxing bread broccoli butter camping cooking coral corn custard dna face
    falafel fishing fondue food fried garlic glasses golf grapes green hamsa herb hockey honey ice jeans lacrosse
    link liquid locked mate milk moai nose oden oncoming paper ping pool popcorn pouring rail rice root rugby sake
    salad salt scissors shorts skis soap soccer spaghetti sushi tennis train tram unlocked wind wedding construction
    motorway memo railway ewe station
"""
SINGULAR_IN_S = ("bus", "cactus", "compass", "dress", "hibiscus", "lotus", "octopus", "rhinoceros", "hippopotamus")
RANKS = ("ace", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "jack", "queen", "king")
SUITS = ("clubs", "diamonds", "hearts", "spades")
RED = ("diamonds", "hearts")
# Tables of vega-datasets: file, what its rows are about, the column of their names, and what other columns mean.
TABLES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("barley.json", "Barley", "variety", {"yield": "yield in bushels an acre"}),
    (
        "burtin.json",
        "Antibiotics",
        "Bacteria",
        {"Penicillin": "dose of penicillin", "Streptomycin": "dose of streptomycin", "Neomycin": "dose of neomycin"},
    ),
    ("cars.json", "Cars", "Name", {"Horsepower": "horsepower", "Weight_in_lbs": "weight in pounds"}),
    ("countries.json", "Countries", "country", {"life_expect": "life expectancy", "fertility": "children a woman"}),
    ("disasters.csv", "Disasters", "Entity", {"Deaths": "deaths a year"}),
    ("driving.json", "Driving", "year", {"miles": "miles a person", "gas": "price of petrol"}),
    ("football.json", "Football", "home_team", {"home_score": "goals at home", "away_score": "goals let in"}),
    (
        "gapminder-health-income.csv",
        "Income and health",
        "country",
        {"income": "income a person", "health": "life expectancy", "population": "people"},
    ),
    ("gapminder.json", "Countries", "country", {"pop": "people", "fertility": "children a woman"}),
    ("income.json", "Income", "name", {"total": "households"}),
    ("iowa-electricity.csv", "Electricity in Iowa", "source", {"net_generation": "thousand megawatt hours"}),
    ("jobs.json", "Jobs", "job", {"count": "people"}),
    ("movies.json", "Films", "Title", {"US Gross": "dollars earned", "IMDB Votes": "votes"}),
    ("penguins.json", "Penguins", "Island", {"Body Mass (g)": "weight in grams", "Beak Depth (mm)": "beak in mm"}),
    ("population_engineers_hurricanes.csv", "States", "state", {"population": "people", "hurricanes": "hurricanes"}),
    ("seattle-weather.csv", "Weather in Seattle", "weather", {"temp_max": "degrees by day", "wind": "wind"}),
    ("stocks.csv", "Shares", "symbol", {"price": "price"}),
    ("unemployment-across-industries.json", "Unemployment", "series", {"count": "thousand people", "rate": "percent"}),
    ("wheat.json", "Wheat", "year", {"wheat": "price of wheat", "wages": "weekly wages"}),
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Split:
    """Which contents and looks a split has: those of training, or those held out from it."""

    name: str
    new_content: bool = False
    new_look: bool = False

    def contents(self, items: Sequence[Item], name: Callable[[Item], str] = str) -> list[Item]:
        """The items of the split. Raises ValueError if there are none."""
        chosen = [item for item in items if is_held_out(name(item)) == self.new_content]
        if not chosen:
            raise ValueError(f"The packages have nothing for the split {self.name}; they are incomplete.")
        return chosen

    def looks(self, kind: str) -> tuple[str, ...]:
        """The looks of a kind (see LOOKS)."""
        return LOOKS[kind]["new" if self.new_look else "train"]


SPLITS = {
    split.name: split
    for split in (
        Split("train"),
        Split("test"),
        Split("test-concept", new_content=True),
        Split("test-style", new_look=True),
    )
}


def is_held_out(name: str) -> bool:
    """Whether training never sees a content: a quarter of all names."""
    return hashlib.sha256(name.lower().encode()).digest()[0] < 64


@dataclass(frozen=True)
class Noun:
    """A thing with a name. words: its name's and its tags'. drawings: SVGs or files, by style."""

    name: str
    theme: str
    words: frozenset[str]
    drawings: dict[str, str | Path] = field(hash=False, compare=False)

    @property
    def phrase(self) -> str:
        """With its article: "an owl"."""
        return f"{'an' if self.name[0] in 'aeio' or self.name.startswith('umb') else 'a'} {self.name}"


@cache
def clash(a: Noun, b: Noun) -> bool:
    """Whether one could pass for the other by its name or tags."""
    return any(
        part in word or word in part
        for one, other in ((a, b), (b, a))
        for part in one.name.split()
        for word in other.words
        if min(len(part), len(word)) > 2
    )


@dataclass(frozen=True)
class Region:
    """A country or state: rings of (longitude, latitude), in degrees."""

    name: str
    rings: tuple[np.ndarray, ...] = field(hash=False, compare=False)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Of each ring: (west, south, east, north)."""
        return np.array([[*ring.min(0), *ring.max(0)] for ring in self.rings])


@dataclass(frozen=True)
class Table:
    """A real table: what its columns mean, and of each row the name and the numbers by column."""

    name: str
    title: str
    columns: dict[str, str]
    rows: tuple[tuple[str, dict[str, float]], ...]


class Shelf:
    """The packages under `root`, each read when it is first needed, and the names of those that were (`used`)."""

    def __init__(self, root: Path):
        self.root = root
        self.used: set[str] = set()
        self.sets: dict[str, dict[str, str]] = {}

    def path(self, package: str, file: str) -> Path:
        """A file of a package."""
        self.used.add(package)
        return package_folder(package, self.root) / file

    def debian(self, package: str) -> Path | None:
        """The folder of one of Debian's packages, if it can be had."""
        folder = debian_folder(package, self.root)
        if folder is not None:
            self.used.add(package)
        return folder

    def read(self, package: str, file: str) -> Any:
        """A JSON file of a package."""
        return json.loads(self.path(package, file).read_text(encoding="utf-8"))

    @cached_property
    def nouns(self) -> list[Noun]:
        """Things that are drawn in two styles of training and one held out, at least."""
        themes = self.read("emojibase-data", "meta/groups.json")["subgroups"]
        drawn = {style: self.icons(style) for style in (*STYLES["train"], "openmoji")}
        found = []
        for entry in self.read("emojibase-data", "en/data.json"):
            name, theme = entry["label"], themes.get(str(entry.get("subgroup")), "")
            if not THEMES.match(theme) or not is_countable(name):
                continue
            drawings: dict[str, str | Path] = {
                style: svg for style, icons in drawn.items() if (svg := self.svg_of(entry, icons)) is not None
            }
            if (render := self.render(entry["hexcode"].lower())) is not None:
                drawings["fluent-emoji-3d"] = render
            if sum(style in drawings for style in STYLES["train"]) > 1 and "fluent-emoji-3d" in drawings:
                words = frozenset(re.findall("[a-z]+", " ".join([name, *entry.get("tags", [])]).lower()))
                found.append(Noun(name, theme, words, drawings))
        return sorted(found, key=lambda noun: hashlib.sha256(noun.name.encode()).digest())

    def icons(self, style: str) -> dict[str, str]:
        """SVGs of an icon set by name, and by code where the set has a table of codes."""
        if style in self.sets:
            return self.sets[style]
        package = f"@iconify-json/{style}"
        data = self.read(package, "icons.json")
        width, height = data.get("width", 16), data.get("height", 16)
        icons = {name: svg_text(icon, width, height) for name, icon in data["icons"].items()}
        codes = self.read(package, "chars.json") if self.path(package, "chars.json").exists() else {}
        self.sets[style] = icons | {code: icons[name] for code, name in codes.items() if name in icons}
        return self.sets[style]

    def svg_of(self, entry: dict[str, Any], icons: dict[str, str]) -> str | None:
        """An emoji's drawing: by its code, or by its name."""
        code, name = entry["hexcode"].lower(), entry["label"]
        keys = (code, code.replace("-fe0f", ""), name.replace(" ", "-"), name.replace(" ", ""))
        return next((icons[key] for key in keys if key in icons), None)

    def render(self, code: str) -> Path | None:
        """An emoji's picture in the style fluent-emoji-3d."""
        names = (code, f"{code}-fe0f", code.replace("-fe0f", ""))
        paths = [self.path("@lobehub/fluent-emoji-3d", f"assets/{name}.webp") for name in names]
        return next((path for path in paths if path.exists()), None)

    @cached_property
    def words(self) -> list[str]:
        """English words of four to nine letters."""
        words = self.read("an-array-of-english-words", "index.json")
        return [word for word in words if 4 <= len(word) <= 9 and word.isalpha()]

    def font(self, name: str, size: int) -> ImageFont.FreeTypeFont:
        """A font of FONTS, `size` pixels high."""
        return ImageFont.truetype(str(self.path(f"@fontsource/{name}", f"files/{name}-latin-400-normal.woff")), size)

    @cached_property
    def texts(self) -> dict[str, str]:
        """Texts of licences by their titles."""
        found = {}
        for path in sorted(self.path("spdx-license-list", "licenses").glob("*.json")):
            data = json.loads(path.read_text(encoding="utf-8"))
            text = " ".join(re.sub(r"<<.*?>>|[-=_*#]{2,}", " ", data.get("licenseText") or "").split())
            if len(text) > 1000 and text.isascii() and len(data["name"]) < 60:
                found[data["name"]] = text
        return found

    @cached_property
    def tables(self) -> list[Table]:
        """The tables of TABLES; rows of one name are averaged."""
        return [self.table(*entry) for entry in TABLES]

    def table(self, file: str, title: str, key: str, columns: dict[str, str]) -> Table:
        """A table of vega-datasets."""
        path = self.path("vega-datasets", f"data/{file}")
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(io.StringIO(text)))
        values: dict[str, dict[str, list[float]]] = {}
        for record in records:
            name = str(record.get(key) or "")
            if 1 < len(name) <= 22 and name.isascii():
                row = values.setdefault(name, {})
                for column in columns:
                    if is_number(record.get(column)):
                        row.setdefault(column, []).append(float(record[column]))
        rows = [
            (name, {column: rounded(float(np.mean(numbers))) for column, numbers in row.items()})
            for name, row in values.items()
            if len(row) == len(columns)
        ]
        return Table(file, title, columns, tuple(rows[:400]))

    @cached_property
    def maps(self) -> dict[str, list[Region]]:
        """The countries of the world, and the states of the United States."""
        countries = read_regions(self.read("world-atlas", "countries-50m.json"), "countries")
        states = read_regions(self.read("us-atlas", "states-10m.json"), "states")
        return {"countries": countries, "states": states}

    @cached_property
    def pages(self) -> dict[str, list[tuple[Path, int]]] | None:
        """The pages of the PDFs of MANUALS, by manual: file and number; None if a manual cannot be had."""
        found: dict[str, list[tuple[Path, int]]] = {}
        for manual in (*MANUALS["train"], *MANUALS["new"]):
            folder = self.debian(manual)
            if folder is None:
                return None
            found[manual] = []
            for path in sorted(folder.rglob("*.pdf*")):
                with open_pdf(path) as pdf:
                    found[manual] += [(path, number) for number in range(len(pdf))]
        return found

    def card(self, deck: str, rank: str, suit: str) -> Image.Image:
        """A playing card, 240 pixels high (RGBA)."""
        number = RANKS.index(rank) + 1
        if deck == "svg-cards":
            name = rank if number > 10 else number
            picture = Image.open(self.path(deck, f"png/1x/{suit.removesuffix('s')}_{name}.png")).convert("RGBA")
            return picture.resize((round(picture.width * 240 / picture.height), 240), Image.Resampling.LANCZOS)
        ink = "#c8102e" if suit in RED else "#111111"
        card = Image.new("RGBA", (172, 240))
        draw = ImageDraw.Draw(card)
        draw.rounded_rectangle((0, 0, 171, 239), 14, fill="white", outline="#888888", width=2)
        if deck == "game-icons":
            name = str(number) if 1 < number < 11 else rank
            svg = self.icons(deck)[f"card-{name}-{suit}"].replace("currentColor", ink)
            drawn = trimmed(rasterised(svg, 240)).resize((172, 240), Image.Resampling.LANCZOS)
            card.alpha_composite(drawn)
            return card
        sign = trimmed(rasterised(self.icons(deck)[f"{suit.removesuffix('s')}-suit"], 84))
        corner = rank[0].upper() if number in (1, 11, 12, 13) else str(number)
        font = self.font("lora" if deck == "noto" else "oswald", 48)
        card.alpha_composite(sign, ((172 - sign.width) // 2, (240 - sign.height) // 2))
        draw.text((12, 6), corner, font=font, fill=ink)
        draw.text((160, 232), corner, font=font, fill=ink, anchor="rs")
        return card


def is_countable(name: str) -> bool:
    """Whether a name can stand after "a"."""
    if not re.fullmatch("[a-z]{2,}( [a-z]+)?", name) or set(UNCOUNTED.split()) & set(name.split()):
        return False
    return not name.endswith("s") or name.split()[-1] in SINGULAR_IN_S


def is_number(value: Any) -> bool:
    """Whether a table's cell holds a number above zero."""
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False


def rounded(number: float) -> float:
    """Three significant digits: what can be read from a chart."""
    return float(f"{number:.3g}")


def svg_text(icon: dict[str, Any], width: int, height: int) -> str:
    """The SVG of an icon as Iconify stores it."""
    box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", width), icon.get("height", height))
    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {head} viewBox="{" ".join(map(str, box))}" width="{box[2]}" height="{box[3]}">{icon["body"]}</svg>'


def rasterised(svg: str, side: int) -> Image.Image:
    """An SVG as a picture (RGBA), `side` pixels high; sizes in millimetres need a resolution."""
    import resvg_py

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, height=side, dpi=90)))).convert("RGBA")


@lru_cache(maxsize=4096)
def cutout(drawing: str | Path) -> Image.Image:
    """A drawing without its empty margins (RGBA), about 160 pixels large."""
    if isinstance(drawing, str):
        return trimmed(rasterised(drawing, 160))
    with Image.open(drawing) as picture:
        drawn = trimmed(picture.convert("RGBA"))
    drawn.thumbnail((160, 160), Image.Resampling.LANCZOS)
    return drawn


def trimmed(picture: Image.Image) -> Image.Image:
    """A picture (RGBA) cropped to what can be seen. Raises ValueError if that is nothing."""
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        raise ValueError("A drawing is empty: nothing of it can be seen.")
    return picture.crop(box)


def read_regions(topology: dict[str, Any], layer: str) -> list[Region]:
    """The named regions of a TopoJSON layer."""
    scale, shift = (np.array(topology["transform"][key]) for key in ("scale", "translate"))
    arcs = [np.cumsum(np.array(arc), axis=0) * scale + shift for arc in topology["arcs"]]

    def ring(numbers: Sequence[int]) -> np.ndarray:
        # A negative number is the arc ~number backwards; each arc begins where the last one ends.
        parts = [arcs[number] if number >= 0 else arcs[~number][::-1] for number in numbers]
        return np.concatenate([parts[0], *(part[1:] for part in parts[1:])])

    regions = []
    for shape in topology["objects"][layer]["geometries"]:
        polygons = {"Polygon": [shape.get("arcs")], "MultiPolygon": shape.get("arcs")}.get(shape["type"], [])
        outlines = [ring(polygon[0]) for polygon in polygons]  # holes are drawn over by the regions in them
        rings = tuple(outline for outline in outlines if np.ptp(outline[:, 0]) < 180)  # not across the date line
        if rings and shape.get("properties", {}).get("name"):
            regions.append(Region(shape["properties"]["name"], rings))
    return regions
