"""The scope view: heat overlays, and the HTML in which they stand. Pure functions of `ScopeMaps`."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from answering import ScopeMaps
from PIL import Image

# Okabe and Ito's colours, which colour-blind people tell apart: a scope has the same one everywhere.
PALETTE = ("#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#56B4E9")
SHOWN_PIXELS = 384


def scope_colour(scope: int) -> str:
    """The colour of a scope, by its place in the configuration."""
    return PALETTE[scope % len(PALETTE)]


def enlarge(picture: Image.Image) -> Image.Image:
    """The picture with its long side at SHOWN_PIXELS."""
    scale = SHOWN_PIXELS / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def overlay(picture: Image.Image, heat: np.ndarray, colour: str) -> Image.Image:
    """The picture in pale greys, the more covered by the colour the more attention (rows, columns) a place got."""
    red_green_blue = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32)
    smooth = Image.fromarray((heat / heat.max()).astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    cover = 0.85 * np.clip(np.asarray(smooth), 0, 1)[..., None]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    pale = 125 + 0.5 * (grey if grey.mean() > 127 else 255 - grey)  # dark paper is shown as a negative
    return Image.fromarray((pale * (1 - cover) + red_green_blue * cover).round().astype(np.uint8))


def overlays(maps: ScopeMaps, token: int | None = None) -> list[Image.Image]:
    """An overlay a scope: for all tokens together, or for one of them."""
    picture = enlarge(maps.picture)
    heats = [maps.overall(s) if token is None else maps.of_token(s, token) for s in range(len(maps.names))]
    return [overlay(picture, heat, scope_colour(s)) for s, heat in enumerate(heats)]


def data_url(picture: Image.Image) -> str:
    """The picture inside an address, so that the page asks for nothing more."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=90, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def percent(share: float) -> str:
    """0.4142 -> 41 %."""
    return f"{100 * share:.0f} %"


def view_html(maps: ScopeMaps, token: int) -> str:
    """The whole view: a row of pictures for all tokens, and one for the token picked."""
    rows, columns = maps.token_grid
    width, height = maps.picture.size
    picture = f'<img src="{data_url(enlarge(maps.picture))}" alt="The picture as the model saw it">'
    everything = figure_html("The picture", f"as the model saw it, {width} × {height}", picture)
    everything += scope_figures(maps, None)
    one = figure_html("Pick a token", f"{rows} × {columns} tokens, coloured by trust", picker_html(maps, token))
    one += scope_figures(maps, token)
    where = f"row {token // columns + 1}, column {token % columns + 1}"
    return (
        f'<h2>Where each scope looked <span class="quiet">all {rows * columns} visual tokens</span></h2>'
        f'<div class="figures">{everything}</div>'
        f'<h2>Where one token looked <span class="quiet">{where}</span></h2><div class="figures">{one}</div>'
        '<p class="quiet">Deeper colour: looked there more. Percentages: the trust that fusion put in a scope. '
        "Both come from the picture alone, before the question is read.</p>"
    )


def scope_figures(maps: ScopeMaps, token: int | None) -> str:
    """A figure a scope: where it looked, and how much it was trusted."""
    weights = maps.weights.mean(axis=1) if token is None else maps.weights[:, token]
    who = "for all tokens" if token is None else "for this token"
    figures = []
    for scope, (name, weight, heat) in enumerate(zip(maps.names, weights, overlays(maps, token), strict=True)):
        alt = f"Where the {name} scope looked {who}, over the picture"
        figures.append(
            f'<figure style="--scope:{scope_colour(scope)}"><figcaption><b><i class="swatch"></i>{escape(name)}</b>'
            f'<span class="weight">trust {percent(weight)}</span></figcaption>'
            f'<div class="frame"><img src="{data_url(heat)}" alt="{escape(alt)}">{anchor_html(maps, token)}</div>'
            f'<div class="bar"><div style="width:{100 * weight:.1f}%"></div></div></figure>'
        )
    return "".join(figures)


def anchor_html(maps: ScopeMaps, token: int | None) -> str:
    """A mark on an overlay where the token has its place."""
    if token is None:
        return ""
    rows, columns = maps.token_grid
    row, column = divmod(token, columns)
    place = f"left:{100 * column / columns:.2f}%;top:{100 * row / rows:.2f}%"
    return f'<i class="anchor" style="{place};width:{100 / columns:.2f}%;height:{100 / rows:.2f}%"></i>'


def figure_html(title: str, note: str, content: str) -> str:
    """A captioned figure."""
    return f'<figure><figcaption><b>{title}</b></figcaption>{content}<span class="quiet">{note}</span></figure>'


def picker_html(maps: ScopeMaps, token: int) -> str:
    """The token grid over the picture: a button a token, filled with the scopes' colours by their weights."""
    columns = maps.token_grid[1]
    shape = f"--columns:{columns};aspect-ratio:{maps.picture.width}/{maps.picture.height}"
    cells = "".join(cell_html(maps, index, index == token) for index in range(maps.weights.shape[1]))
    return f'<div class="picker" role="group" aria-label="Visual tokens" style="{shape}">{cells}</div>'


def cell_html(maps: ScopeMaps, index: int, picked: bool) -> str:
    """One token's button; only the one picked is a tab stop, and arrow keys lead to the others."""
    weights, columns = maps.weights[:, index], maps.token_grid[1]
    ends = 100 * weights.cumsum()
    stripes = ",".join(
        f"{scope_colour(s)} {end - 100 * weight:.1f}% {end:.1f}%"
        for s, (weight, end) in enumerate(zip(weights, ends, strict=True))
    )
    shares = ", ".join(f"{name} {percent(weight)}" for name, weight in zip(maps.names, weights, strict=True))
    label = escape(f"Token in row {index // columns + 1}, column {index % columns + 1}: {shares}")
    return (
        f'<button type="button" data-token="{index}" aria-pressed="{str(picked).lower()}" aria-label="{label}" '
        f'title="{label}" tabindex="{0 if picked else -1}" style="background:linear-gradient(0deg,{stripes})">'
        "</button>"
    )


def empty_html(names: list[str]) -> str:
    """What stands in the place of the view before the first answer."""
    figures = figure_html("The picture", "", '<div class="blank"></div>') + "".join(
        f'<figure style="--scope:{scope_colour(s)}"><figcaption><b><i class="swatch"></i>{escape(name)}</b>'
        '</figcaption><div class="blank"></div></figure>'
        for s, name in enumerate(names)
    )
    return (
        f'<h2>What each scope looked at</h2><div class="figures">{figures}</div>'
        '<p class="quiet">Ask about a picture, and this shows where each scope looked in it and how much each '
        "visual token trusted it.</p>"
    )


def header_html(note: str) -> str:
    """The title, what the page shows, and what this model can be asked."""
    return (
        "<h1>MS-Resampler</h1><p>Ask about a picture. The model reads it through a few <em>scopes</em>, from local "
        "to global; beside the answer you see where each scope looked, and how far every visual token trusted it."
        f'</p><p class="quiet">{escape(note)}</p>'
    )


def examples_html(folder: Path, scenes: list[dict]) -> str:
    """The example pictures, each a button with its question."""
    buttons = "".join(
        f'<button type="button" data-scene="{number}"><img src="{data_url(Image.open(folder / scene["file"]))}" '
        f'alt="{escape(scene["alt"])}"><span>{escape(scene["question"])}</span></button>'
        for number, scene in enumerate(scenes)
    )
    return f'<h2>Or ask about one of these</h2><div class="scenes">{buttons}</div>'


# Clicks and keys in the picker; after a redraw the focus returns to the token that was picked.
PICKER_SCRIPT = """
const columns = () => Number(getComputedStyle(element.querySelector('.picker')).getPropertyValue('--columns'));
let refocus = false;
element.addEventListener('click', event => {
  const cell = event.target.closest('[data-token]');
  if (cell) { refocus = true; trigger('pick', {token: Number(cell.dataset.token)}); }
});
element.addEventListener('keydown', event => {
  const cell = event.target.closest('[data-token]');
  if (!cell) return;
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns()}[event.key];
  const next = element.querySelector(`[data-token="${Number(cell.dataset.token) + step}"]`);
  if (step && next) { event.preventDefault(); next.focus(); }
});
watch('value', () => {
  if (refocus) element.querySelector('[data-token][aria-pressed="true"]')?.focus({preventScroll: true});
  refocus = false;
});
"""
