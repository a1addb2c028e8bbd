"""The pages' elements: HTML and scripts around Gradio's components."""

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from answering import Answerer
from examples import Examples
from pictures import MAX_FILE_MEGABYTES, MAX_PICTURES, TOO_LARGE, TOO_MANY
from PIL import Image
from scope_view import FUSED_COLOUR, data_url, scope_legend
from settings import MAX_NEW_TOKENS, MAX_SYSTEM_CHARACTERS, MAX_TEMPERATURE, MIN_TOP_P, Settings

HERE = Path(__file__).resolve().parent
INTAKE_SCRIPT = (HERE / "intake.js").read_text()
PAGE_SCRIPT = f"() => {{\n{(HERE / 'page.js').read_text()}\n}}"
VIEW_FILES = ("heat", "rings", "view_texts", "view_parts", "view_links", "view_pairs", "view")
VIEW_SCRIPT = "\n".join((HERE / f"{name}.js").read_text() for name in VIEW_FILES)
# Ignored while an answer is being written, which another one would overwrite. Scenes to play with come in random order.
EXAMPLES_SCRIPT = """
let left = [];
const linked = Number(new URLSearchParams(location.search).get('example') ?? NaN);
const known = linked >= 0 && linked < props.shown + props.played;
if (known && element.closest('#scenes')) trigger('choose', {scene: linked});
element.addEventListener('click', async event => {
  const button = event.target.closest('button');
  await window.talk?.begun;
  if (!button || element.closest('.page').querySelector('.ask .stop-button')) return;
  if (button.dataset.scene) return trigger('choose', {scene: Number(button.dataset.scene)});
  if (!left.length) left = [...Array(props.played).keys()];
  const [one] = left.splice(Math.floor(Math.random() * left.length), 1);
  trigger('choose', {scene: props.shown + one});
});
"""
# Props change with the model. Their names are not quoted, because Gradio takes quoted words in a script for events.
BUDGET_SCRIPT = (
    (HERE / "curve.js").read_text()
    + """
const [range, out, curve] = ['input', 'output', '.curve'].map(part => element.querySelector(part));
const show = () => {
  const {budgets, patches, trained} = props, count = budgets[range.value];
  const saved = Math.round(100 * (1 - count / patches));
  const own = count === trained ? '' : `; the model was trained with ${trained}`;
  out.textContent = `${count} for ${patches} ${patches === 1 ? 'patch' : 'patches'}, ${saved} % saved${own}`;
  range.setAttribute('aria-valuetext', out.textContent);
  curve.innerHTML = props.scores.length ? curveOf(props.scores, count) : '';
};
range.addEventListener('input', () => { props.value = props.budgets[range.value]; show(); });
const take = () => {
  range.max = props.budgets.length - 1;
  range.value = props.budgets.indexOf(props.value);
  show();
};
watch(Object.keys(props), take);
take();
const linked = Number(new URLSearchParams(location.search).get('tokens'));
if (element.closest('#budget') && props.budgets.includes(linked)) setTimeout(() => { props.value = linked; take(); });
"""
)
LARGE = ' class="large"'
TILES_ARE = "A large picture is cut at its own proportions; the visual tokens stay as many."
# Numbers of tiles to choose from, and what they are called; the page's link names one, too.
TILES = {None: "none", 4: "up to 4", 9: "up to 9"}
TILES_SCRIPT = """
const choices = [...element.querySelectorAll('input')], linked = new URLSearchParams(location.search).get('tiles');
const take = () => { props.value = Number(choices.find(one => one.checked).value) || null; };
element.addEventListener('change', take);
const wanted = element.closest('#tiles') && choices.find(one => one.value && one.value === linked);
if (wanted) setTimeout(() => { wanted.checked = true; take(); });
"""
WITHOUT_SCOPES = "The projector of this model, {}, has no scopes, so there are no maps of them to see."


def budget_slider(answerer: Answerer, budget: int, label: str, elem_id: str) -> gr.HTML:
    """A slider for the number of visual tokens per picture, which shows what that saves, and how often it is right."""
    return gr.HTML(
        budget,
        html_template=f'<label><span>{escape(label)}</span><input type="range" min="0"></label><output></output>'
        '<div class="curve"></div>',
        js_on_load=BUDGET_SCRIPT,
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes="budget",
        **budget_props(answerer),
    )


def budget_props(answerer: Answerer) -> dict[str, Any]:
    """The slider's properties for a model."""
    scores = [
        {"visual_tokens": int(row["visual_tokens"])} | {name: float(row[name]) for name in ("mean", "low", "high")}
        for row in sorted(answerer.scores, key=lambda row: row["visual_tokens"])
    ]
    budgets = {"budgets": answerer.budgets(), "patches": answerer.patches, "trained": answerer.trained_budget}
    return {**budgets, "scores": scores}


def tiles_choice(label: str, elem_id: str) -> gr.HTML:
    """Into how many tiles a large picture is cut at most; none, at first."""
    choices = "".join(
        f'<label><input type="radio" name="{elem_id}-count" value="{count or ""}"{" checked" * (not count)}>'
        f"{name}</label>"
        for count, name in TILES.items()
    )
    return gr.HTML(
        None,
        html_template=f'<fieldset><legend>{escape(label)}</legend>{choices}</fieldset><p class="quiet">{TILES_ARE}</p>',
        js_on_load=TILES_SCRIPT,
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes="tiles",
    )


def settings_panel() -> list[gr.components.Component]:
    """System prompt and sampling options, folded."""
    with gr.Accordion("More settings", open=False, elem_id="settings"):
        return [
            gr.Textbox(
                label="System prompt",
                placeholder="None; most answers are best without",
                lines=2,
                max_length=MAX_SYSTEM_CHARACTERS,
            ),
            gr.Slider(
                0,
                MAX_TEMPERATURE,
                Settings.temperature,
                step=0.05,
                label="Temperature",
                info="0 always takes the most likely token",
            ),
            gr.Slider(MIN_TOP_P, 1, Settings.top_p, step=0.05, label="Top-p", info="Used with a temperature above 0"),
            gr.Slider(1, MAX_NEW_TOKENS, Settings.max_new_tokens, step=1, label="Longest answer, in tokens"),
        ]


def ask_box(elem_id: str) -> gr.MultimodalTextbox:
    """The box to type in."""
    return gr.MultimodalTextbox(
        label="Your question and pictures",
        show_label=False,
        placeholder="Drop or paste a picture here, and ask about it",
        sources=["upload"],
        file_types=["image"],
        file_count="multiple",
        max_plain_text_length=10**6,  # Gradio attaches longer texts as a file; too long questions are refused instead
        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        elem_id=elem_id,
        elem_classes="ask",
    )


def intake() -> gr.HTML:
    """What puts pictures into the box, and says why one cannot be used; its value is the pictures just sent."""
    return gr.HTML(
        None,
        html_template='<p class="quiet" role="status"></p>',
        js_on_load=INTAKE_SCRIPT,
        apply_default_css=False,
        elem_classes="intake",
        most=MAX_PICTURES,
        too_many=TOO_MANY,
        most_bytes=MAX_FILE_MEGABYTES * 2**20,
        too_large=TOO_LARGE,
    )


def box_update(answering: bool, **changes: Any) -> gr.MultimodalTextbox:
    """Shows a Stop button instead of Send while an answer is written."""
    return gr.MultimodalTextbox(submit_btn=not answering, stop_btn=answering, **changes)


def scope_view(answerer: Answerer, elem_id: str, name: str, beside: str, asks: bool = False) -> gr.HTML:
    """Where an answer's maps are drawn; `name` is for screen readers.

    `beside` is where the answer itself stands, to which a narrow page scrolls. `asks`: words, layers, proofs and files
    can be requested; views that do not ask share their selection with each other.
    """
    return gr.HTML(
        None,
        html_template=f'<div class="view" role="region" aria-label="{escape(name)}"></div>',
        js_on_load=VIEW_SCRIPT,
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes="scope-view",
        fused_colour=FUSED_COLOUR,
        asks=asks,
        beside=beside,
        **view_props(answerer),
        **({"layers": answerer.scope_heads, "language_heads": answerer.language_heads} if asks else {}),
    )


def view_props(answerer: Answerer) -> dict[str, Any]:
    """The scope view's properties for a model."""
    kind = answerer.model.config.projector_config.projector_type
    return {"scopes": scope_legend(answerer.scopes), "without_scopes": WITHOUT_SCOPES.format(kind)}


def header(note: str) -> gr.HTML:
    """The title, an introduction, and a note on what this model can be asked, if there is one."""
    paragraph = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return gr.HTML(
        "<h1>MS-Resampler</h1><p>Ask about a picture. The model reads it through a few <em>scopes</em>, from local "
        "to global; beside the answer you see where each scope looked, and how far every visual token trusted it.</p>"
        + paragraph,
        elem_id="header",
    )


def example_scenes(examples: Examples, title: str, elem_id: str) -> gr.HTML:
    """The example pictures, each a button with its question, and a button for a random one, if there are any."""
    buttons = "".join(
        f'<button type="button" data-scene="{number}"{LARGE if example.large else ""}>'
        f'<img src="{data_url(Image.open(example.path))}" alt="{escape(example.alt)}">'
        f"<span>{'<b>Large, for tiles:</b> ' if example.large else ''}{escape(example.question)}</span></button>"
        for number, example in enumerate(examples.shown)
    )
    another = '<button type="button" class="another">A new scene</button>' if examples.played else ""
    return gr.HTML(
        f'<div class="title"><h2>{escape(title)}</h2>{another}</div><div class="scenes">{buttons}</div>',
        js_on_load=EXAMPLES_SCRIPT,
        elem_id=elem_id,
        elem_classes="examples",
        shown=len(examples.shown),
        played=len(examples.played),
    )
