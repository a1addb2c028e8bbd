"""Real pages: PDFs of documentation, and where on a page each line of text stands."""

import gzip
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

Box = tuple[float, float, float, float]  # left, bottom, right, top; in points, from the lower left corner
MARGIN = 6  # points around the lines of a crop
LONGEST_GAP = 1.2  # between two lines of a crop, in line heights


@dataclass(frozen=True)
class Line:
    """A line of text, its box, and whether no figure in it is raised or lowered."""

    text: str
    box: Box
    level: bool


def open_pdf(path: Path) -> Any:
    """A PDF, which may be compressed with gzip."""
    import pypdfium2

    return pypdfium2.PdfDocument(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


@lru_cache(maxsize=256)
def lines_of(path: Path, number: int) -> tuple[Line, ...]:
    """The lines of text of a page, the highest first."""
    found: list[Line] = []
    start = 0
    with open_pdf(path) as pdf:
        text_page = pdf[number].get_textpage()
        for part in re.split("(\r\n)", text_page.get_text_range()):
            if part.strip():
                boxes = {i: text_page.get_charbox(start + i) for i, sign in enumerate(part) if not sign.isspace()}
                left, bottom, right, top = zip(*boxes.values(), strict=True)
                feet = [box[1] for i, box in boxes.items() if part[i].isdigit() or part[i].isupper()]
                level = not feet or max(feet) - min(feet) < 0.2 * (max(top) - min(bottom))
                found.append(Line(" ".join(part.split()), (min(left), min(bottom), max(right), max(top)), level))
            start += len(part)
    return tuple(sorted(found, key=lambda line: -line.box[3]))


def runs_of(lines: tuple[Line, ...], longest: int) -> list[tuple[tuple[Line, ...], Box]]:
    """Every run of two to `longest` lines of plain text that stand close below each other, and the box to cut out.

    No part of another line is in the box.
    """
    runs = []
    for first in range(len(lines)):
        for last in range(first, min(first + longest, len(lines))):
            line = lines[last]
            if not (line.level and len(line.text) > 3 and re.fullmatch(r"[!-~]+( [!-~]+)*", line.text)):
                break
            if last > first:
                gap, height = lines[last - 1].box[1] - line.box[3], line.box[3] - line.box[1]
                if not 0 <= gap <= LONGEST_GAP * height:
                    break
                run = lines[first : last + 1]
                left, bottom, right, top = zip(*(line.box for line in run), strict=True)
                above = min((other.box[1] for other in lines[:first]), default=10 * top[0])
                below = max((other.box[3] for other in lines[last + 1 :]), default=-bottom[-1])
                if below < min(bottom) and above > max(top):
                    lowest, highest = max(-MARGIN, (below - min(bottom)) / 2), min(MARGIN, (above - max(top)) / 2)
                    box = (min(left) - MARGIN, min(bottom) + lowest, max(right) + MARGIN, max(top) + highest)
                    runs.append((run, box))
    return runs


def crop(path: Path, number: int, box: Box, scale: float) -> Image.Image:
    """A part of a page, `scale` pixels a point."""
    with open_pdf(path) as pdf:
        width, height = pdf[number].get_size()
        cut = (box[0], box[1], width - box[2], height - box[3])
        return pdf[number].render(scale=scale, crop=tuple(max(0.0, side) for side in cut)).to_pil().convert("RGB")
