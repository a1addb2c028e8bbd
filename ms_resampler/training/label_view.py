"""Shows which tokens of a record are trained: in colour in the terminal, and on a self-contained page."""

import base64
import html
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL import Image

from ..images_ms_resampler import open_picture
from .collate import IGNORED, ConversationCollator
from .conversations import images_of, name_of

GREEN, GREY, PLAIN = "\x1b[30;42m", "\x1b[90m", "\x1b[0m"
THUMBNAIL_PIXELS = 280


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown together: those of an image, or of one character."""

    text: str
    ids: tuple[int, ...]
    learned: bool
    kind: str  # "text", "added" (a special or added token) or "image"


@dataclass(frozen=True)
class Example:
    """A record as it is trained on."""

    record_id: str
    images: list[Any]
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def learned(self) -> int:
        """The number of trained tokens."""
        return sum(len(piece.ids) for piece in self.pieces if piece.learned)


def example_of(record: dict[str, Any], collator: ConversationCollator) -> Example:
    """A good record, split into pieces."""
    row = collator.encode(record)
    learned = (row["labels"] != IGNORED).tolist()
    pieces = pieces_of(row["input_ids"].tolist(), learned, collator.processor)
    images = [open_picture(image, collator.processor.max_pixels) for image in images_of(record)]
    return Example(name_of(record), images, pieces)


def pieces_of(ids: Sequence[int], learned: Sequence[bool], processor: Any) -> list[Piece]:
    """Tokens as text; the tokens of an image, or of a shared character, form one piece."""
    tokenizer = processor.tokenizer
    added = set(tokenizer.added_tokens_decoder)
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]  # decoded before a word to keep its space
    before = len(tokenizer.decode(anchor))
    pieces: list[Piece] = []
    for is_image, group in groupby(zip(ids, learned, strict=True), lambda pair: pair[0] == processor.image_token_id):
        run = list(group)
        if is_image:
            pieces.append(Piece(f"{len(run)} visual tokens", tuple(token for token, _ in run), False, "image"))
            continue
        waiting: list[int] = []
        for token, is_learned in run:
            waiting.append(token)
            text = tokenizer.decode([*anchor, *waiting], clean_up_tokenization_spaces=False)[before:]
            if "\ufffd" not in text or token in added or len(waiting) == 4:  # UTF-8 has no longer characters
                kind = "added" if token in added else "text"
                pieces.append(Piece(text.replace("\x1b", "␛"), tuple(waiting), is_learned, kind))
                waiting = []
        if waiting:
            pieces.append(Piece("\ufffd", tuple(waiting), run[-1][1], "text"))
    return pieces


def coloured_text(example: Example) -> str:
    """An example for the terminal: trained tokens in green, or between ⟦ and ⟧ without colours."""
    colours = (sys.stdout.isatty() or "FORCE_COLOR" in os.environ) and "NO_COLOR" not in os.environ
    lines = [f"Record {example.record_id}: {example.tokens} tokens, {example.learned} trained"]
    text = ""
    for learned, group in groupby(example.pieces, lambda piece: piece.learned):
        pieces = list(group)
        if not learned:
            text += "".join(faint(piece, colours) for piece in pieces)
        elif colours:  # token by token, so that the background ends with the text
            text += "".join(f"{GREEN}{piece.text}{PLAIN}".replace("\n", f"↵{PLAIN}\n{GREEN}") for piece in pieces)
        else:
            text += f"⟦{''.join(piece.text for piece in pieces)}⟧"
    return "\n".join([*lines, text])


def faint(piece: Piece, colours: bool) -> str:
    """An untrained piece: grey if it is not text."""
    text = f"[{piece.text}]" if piece.kind == "image" else piece.text
    return f"{GREY}{text}{PLAIN}" if colours and piece.kind != "text" else text


def page(title: str, report: str, examples: Sequence[Example]) -> str:
    """A self-contained page with the report and the examples, images included."""
    title = html.escape(title)
    body = "".join(example_html(example) for example in examples)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.6 system-ui, sans-serif; }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; font-size: 13px; line-height: 1.45; }}
section {{ display: flex; gap: 1.5rem; align-items: flex-start; flex-wrap: wrap; margin: 2rem 0; }}
h2 {{ flex-basis: 100%; font-size: 1rem; margin: 0; }}
img {{ max-width: {THUMBNAIL_PIXELS}px; border-radius: 6px; display: block; margin-bottom: .5rem; }}
.tokens {{ flex: 1 1 24rem; font: 13px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
.tokens span {{ border-radius: 3px; padding: 2px 0; box-shadow: inset 0 0 0 1px #8883; }}
.learned {{ background: #2e9e5b55; }}
.added {{ color: #8a6d1f; }}
.tokens .image {{ background: #4a7bd044; border-radius: 1em; padding: 2px .8em; font-family: system-ui, sans-serif; }}
@media (prefers-color-scheme: dark) {{ .added {{ color: #d9b75a; }} }}
</style>
<h1>{title}</h1>
<p class="tokens"><span class="learned">trained</span> <span>read only</span> <span class="added">added token</span>
<span class="image">visual tokens</span> point at a token for its number</p>
{body}
<pre>{html.escape(report)}</pre>
</html>
"""


def example_html(example: Example) -> str:
    """One example of the page."""
    pictures = "".join(f'<img alt="" src="{data_uri(image)}">' for image in example.images)
    tokens = "".join(piece_html(piece) for piece in example.pieces)
    about = f"{example.tokens} tokens, {example.learned} trained"
    head = f"<h2>Record {html.escape(example.record_id)}: {about}</h2>"
    return f'<section>{head}<div>{pictures}</div><div class="tokens">{tokens}</div></section>\n'


def piece_html(piece: Piece) -> str:
    """One piece as a span; a line break is shown, too."""
    classes = " ".join([*(["learned"] if piece.learned else []), *([piece.kind] if piece.kind != "text" else [])])
    ids = "image" if piece.kind == "image" else " ".join(map(str, piece.ids))
    return f'<span class="{classes}" title="{ids}">{html.escape(piece.text).replace(chr(10), "↵" + chr(10))}</span>'


def data_uri(image: Any) -> str:
    """A small copy of a picture as a data URL."""
    small = image.copy() if isinstance(image, Image.Image) else Image.fromarray(image)
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stored = io.BytesIO()
    small.save(stored, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stored.getvalue()).decode()}"
