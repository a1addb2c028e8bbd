"""The data that the page's scope view (view.js) draws: maps and words, packed."""

import base64
import io
import zlib
from typing import Any

import numpy as np
from answering import ScopeMaps, Step
from layers import Usual
from measures import GRIDS
from PIL import Image
from settings import Settings
from words import Word

# Okabe and Ito's palette, which colour-blind people can tell apart; a scope has the same colour everywhere.
PALETTE = ("#E69F00", "#009E73", "#0072B2", "#D55E00", "#56B4E9")
FUSED_COLOUR = "#AA3377"
SHOWN_PIXELS = 384


def scope_legend(names: list[str]) -> list[dict[str, str]]:
    """Names and colours of a projector's scopes: common names have fixed colours, others are coloured by position."""
    usual = ["local", "regional", "global"]
    places = [usual.index(name) for name in names] if set(names) <= set(usual) else range(len(names))
    return [{"name": name, "colour": PALETTE[place % len(PALETTE)]} for name, place in zip(names, places, strict=True)]


def view_value(
    scopes: list[str],
    step: Step,
    usual: Usual,
    settings: Settings,
    number: int = 0,
    example: int | None = None,
) -> dict[str, Any]:
    """The maps of an answer's first step, and the usual trust beside them; `number` is the answer's index
    in the conversation, `example` that of the example which is asked about, if it is one.
    """
    return {
        "number": number,
        "example": example,
        "scopes": scope_legend(scopes),
        "pictures": [picture_value(maps, usual.for_tokens(maps)) for maps in step.maps or []],
        "milliseconds": step.milliseconds,  # not rounded, because Gradio does not send a value that has not changed
        "reading": step.reading,
        "asked": {name: getattr(settings, name) for name in ("visual_tokens", "system_prompt", "tiles")},
    }


def picture_value(maps: ScopeMaps, usual: np.ndarray) -> dict[str, Any]:
    """A picture with its grids and the maps of the last layer."""
    return {
        "image": data_url(enlarge(maps.picture)),
        "size": list(maps.picture.size),
        **{name: list(getattr(maps, name)) for name in GRIDS},
        "places": maps.places.tolist(),
        "words": maps.words,
        "read": maps.read,
        "kept": maps.kept,
        **layer_value(maps, usual[-1]),
    }


def layer_value(maps: ScopeMaps, usual: np.ndarray) -> dict[str, str]:
    """A layer's trust and what is usual (S, M), and attention (S, M, N)."""
    trusts = {"weights": packed(maps.weights.astype("<f4")), "usual": packed(usual.astype("<f4"))}
    return trusts | packed_rows(maps.attentions)


def words_value(words: list[Word]) -> dict[str, Any]:
    """The words of an answer, each with its attention over the visual tokens of all pictures, and its probability."""
    return {
        "texts": [word.text for word in words],
        "probabilities": [word.probability for word in words],
        "likeliest": [word.likeliest for word in words],
        **packed_rows(np.stack([word.shares for word in words])),
    }


def packed_rows(rows: np.ndarray) -> dict[str, str]:
    """Rows of shares, each in steps of 1/65535 of its peak."""
    peaks = rows.max(axis=-1, keepdims=True, initial=0)
    steps = np.divide(65535 * rows, peaks, out=np.zeros_like(rows, dtype=float), where=peaks > 0)
    return {"peaks": packed(peaks.astype("<f4")), "steps": packed(steps.round().astype("<u2"))}


def packed(numbers: np.ndarray) -> str:
    """Deflated, in base64."""
    return base64.b64encode(zlib.compress(numbers.tobytes())).decode()


def enlarge(picture: Image.Image) -> Image.Image:
    """The picture with its long side at SHOWN_PIXELS."""
    scale = SHOWN_PIXELS / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def data_url(picture: Image.Image) -> str:
    """The picture as a data URL, so that the page makes no further requests."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=90, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
