"""The tour: the words that the page uses, each explained in a sentence."""

from pathlib import Path

import gradio as gr
from answering import Answerer

TOUR_SCRIPT = (Path(__file__).resolve().parent / "tour.js").read_text()
# What a step is about, which style.css marks on the page, and what it says.
TOKENS = (
    "tokens",
    "A <b>patch</b> is a small square of the picture, one of {patches}. A <b>visual token</b> is what the language "
    "model gets in place of patches: one for each cell of a grid.",
)
SCOPES = (
    "scopes",
    "A <b>scope</b> is how far a token may look: local stays near it, global goes anywhere, and a ring shows how far "
    "each really looked. <b>Trust</b> is the part that a scope has in a token.",
)
BUDGET = (
    "budget",
    "The <b>budget</b> is the number of visual tokens: fewer cost the language model less, and the same weights serve "
    "any of them.",
)


def tour(answerer: Answerer) -> gr.HTML:
    """The steps, shown at the first visit; a button brings them back."""
    steps = [TOKENS, SCOPES, BUDGET] if answerer.scopes else [TOKENS, BUDGET]
    shown = "".join(
        f'<li data-step="{about}" hidden><p>{text.format(patches=answerer.patches)}</p></li>' for about, text in steps
    )
    return gr.HTML(
        '<button type="button" class="begin" hidden>What are tokens, scopes, trust?</button>'
        f'<section class="tour" aria-label="Tour" hidden><ol>{shown}</ol><div>'
        '<span class="quiet"></span><button type="button" class="back">Back</button>'
        '<button type="button" class="next">Next</button>'
        '<button type="button" class="end">Close</button></div></section>',
        js_on_load=TOUR_SCRIPT,
        apply_default_css=False,
        elem_id="tour",
    )
