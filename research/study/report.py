"""The report, `study.md` and its figures, made from stored results alone, so that it can be checked against them."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ms_resampler.folders import write_whole

from ..timing import markdown_table
from .figures import draw_figures, figures_of
from .plan import AMID_PAPER, BASELINE, CELLS, ELASTIC, FEW, IN_WORLDS, LEARNED, LOCAL, OURS, REFERENCE
from .results import ABOUT, ENOUGH_SEEDS, RUNS, Results, fingerprint, load, results_folder
from .statistics import GROUPS, Difference, Estimate, corrected
from .worlds import EVEN, MARGINS, UNEVEN

ONE_POINT = 0.01
MARGINS_EXPLAINED = """In these scenes things lie on a 3 x 3 grid of places, at most one in each. With 9 tokens
each of TokenPacker's windows, and each of our cells, is exactly one place. Here the same scenes are put on a blank page
of 16 x 16 patches and read with 16 tokens, which keeps the size of the cells: once with cells on the places, and once
shifted by two patches, so that each place is spread over four cells (and all 16 cells, not nine, hold part of the
scene)."""
WORLDS_EXPLAINED = f"""Pages as large as the pictures above hold scenes of half the size: *quarter*, anywhere on a blank
page; *quarter, textured*, every patch of the page of another scene's paper; *lines*, rows apart, each with a margin of
its own; *clusters*, rows, and places along them, denser towards one side. A page's patches are 2 x 2 of the scene's,
reduced to as many channels. {FEW} tokens, learning rates of the even world, `moving_scopes` off and on; *told where* is
an oracle, told which patches hold the scene. Readers are told nothing. Nothing was chosen by these scores."""
SEVERAL = {"elastic": "one, at random", "together": "all"}  # how weights are trained with several budgets
PRELIMINARY = (
    "\n\n**Preliminary: the score tables cover {seeds}.** Seeds differ by about as much as neighbouring rows do, so "
    "conclusions need five."
)
EXCLUDES_ZERO = "* marks a number for which the 95% interval of the difference excludes zero."


def write_report(folder: Path) -> None:
    """Writes `FOLDER/study.md` and `FOLDER/study/*.png` from the stored results."""
    results = load(results_folder(folder))
    (folder / "study").mkdir(exist_ok=True)
    draw_figures(results, folder / "study", results_hash(folder))
    write_whole(folder / "study.md", report_text(results))


def check_report(folder: Path) -> None:
    """Raises ValueError if the report or a figure is not that of the stored results."""
    stored, page = results_folder(folder), folder / "study.md"
    if not page.exists() or page.read_text(encoding="utf-8") != report_text(load(stored)):
        raise ValueError(f"{page} is not the report of the results in {stored}: write it again.")
    for name in figures_of(load(stored)):
        path = folder / "study" / f"{name}.png"
        if not path.exists() or drawn_from(path) != results_hash(folder):
            raise ValueError(f"{path} was not drawn from the results in {stored}: write the report again.")


def results_hash(folder: Path) -> str:
    """A hash of the stored results, which the figures carry."""
    stored = results_folder(folder)
    return fingerprint(stored / ABOUT, stored / RUNS)


def drawn_from(path: Path) -> str | None:
    """The hash of the results that a figure carries."""
    with Image.open(path) as picture:
        return picture.info.get("Results")


def report_text(results: Results) -> str:
    """The whole report, in Markdown."""
    sections = [introduction(results)]
    for tokens in results.budgets:
        sections += [f"## {tokens} tokens", main_table(results, tokens), verdict(results, tokens)]
    if tables := world_tables(results):
        sections += ["## Where information is spread unevenly", WORLDS_EXPLAINED, tables]
    figures = figures_of(results).items()
    sections += ["## Figures", *(f"![{name}](study/{name}.png)\n\n{caption}" for name, caption in figures)]
    if results.ablations(OURS):
        sections += [f"## Ablations, {results.middle} tokens", ablation_table(results, OURS)]
    if any(results.arms(tokens, "elastic") for tokens in results.budgets):
        sections += ["## One set of weights for every budget", elastic_table(results)]
    if tables := margin_tables(results):
        sections += ["## Cells on the places of things, and across them", MARGINS_EXPLAINED, tables]
    sections += ["## Cost", cost_table(results), how_it_was_made(results)]
    return "\n\n".join(sections) + "\n"


def introduction(results: Results) -> str:
    """What is asked, and under which conditions."""
    study, data = results.study, results.study["data"]
    least = min(len(results.blocks(*results.contenders(tokens))) for tokens in results.budgets)
    seeds = f"{least} seed{'s' if least > 1 else ''}"
    preliminary = "" if least >= ENOUGH_SEEDS else PRELIMINARY.format(seeds=seeds)
    rates = ", ".join(f"{rate:g}" for rate in study["learning_rates"])
    return f"""# Does multi-scope resampling win?

The claim: at a fixed token budget, several resamplers, each with its own spatial scope, fused adaptively, beat one
global resampler. A single-scope resampler, global *or local*, that is as good on every task at equal or lower cost
would refute it.{preliminary}

**Setting.** {data["train_scenes"]:,} synthetic scenes of one to nine handwritten digits, shapes and words, on 12 x 12
patches. The tower is a frozen ConvNeXt, trained to name what is under each patch, with position codes added to its
features. A two-layer reader, pretrained on textual descriptions of scenes, stands in for the language model. Each run
trains a new projector and a copy of the reader for {study["steps"]} steps of {study["batch_size"]} images with eight
questions each, at the best of the learning rates ({rates}) by validation score at {results.middle} tokens (`{LOCAL}`,
which is `{OURS}` with one scope, uses that of `{OURS}`). Free widths are set to match the parameters of `{BASELINE}`.
Test scenes use digits that no part was trained on.

**Scores** on {data["test_scenes"]} test scenes: exact answers to questions that need a local (read, colour, shape),
regional (presence, where, relation, compare) or global view (count, count of a colour, majority), and *dense*, the
share of patches whose name and colour can be predicted from the tokens. Overall is the mean of the four groups.
Intervals are 95% bootstrap intervals over images and seeds. Differences are in percentage points, paired by seed and
image, with runs of the same tower, reader and kind of machine ([how it was made](#how-it-was-made)), over
{ENOUGH_SEEDS} seeds unless a name is followed by another number. p-values are t-tests over seeds, adjusted within each
table (Benjamini and Hochberg). {EXCLUDES_ZERO}

**Validation.** The design of `{OURS}` was chosen by looking at test scores of two of the seeds
([log](../research/log.md)), which favours it over peers built as published. So overall differences from other
projectors are also given on {data["validation_scenes"]} validation scenes, which chose nothing but learning rates
(* by a t-interval over seeds)."""


def signed(difference: Difference, column: int) -> str:
    """A difference in percentage points and its interval: "+1.2 (+0.3, +2.0)"."""
    mean, low, high = interval(difference.estimate, column)
    return f"{100 * mean:+.1f} ({100 * low:+.1f}, {100 * high:+.1f})"


def interval(estimate: Estimate, column: int) -> tuple[float, float, float]:
    """The mean of a group, and the ends of its interval."""
    return estimate.mean_G[column], estimate.low_G[column], estimate.high_G[column]


def starred(mean: float, low: float, high: float) -> str:
    """A difference in percentage points, with a star if its interval excludes zero: "+1.2*"."""
    return f"{100 * mean:+.1f}{star(low, high)}"


def star(low: float, high: float) -> str:
    """A star if the interval of a difference lies on one side of zero; that of a single seed is NaN."""
    return "*" if low > 0 or high < 0 else ""


def number(value: float, digits: int) -> str:
    """A number, or a dash for NaN."""
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def main_table(results: Results, tokens: str) -> str:
    """All projectors at a budget, the best first: our score minus theirs, and scores, with stars of differences.

    The MLP keeps all patches, whatever the budget, and is not compared.
    """
    contenders, found, rows = results.contenders(tokens), rivals(results, tokens), []
    for (arm, _, _), estimate in sorted(results.estimates(*contenders).items(), key=lambda item: -item[1].mean_G[-1]):
        seeds, compared, stars = len(results.blocks(*contenders)), ["–", "–"], [""] * len(GROUPS)
        if arm in found:
            difference = found[arm]
            seeds, compared = difference.seeds, [signed(difference, -1), starred(*difference.validation)]
            stars = [star(*interval(difference.estimate, column)[1:]) for column in range(len(GROUPS))]
        scores = [f"{100 * mean:.1f}{mark}" for mean, mark in zip(estimate.mean_G, stars, strict=False)]
        name = f"{arm} (144 tokens)" if arm in REFERENCE else f"**{arm}**" if arm == OURS else arm
        rows.append([with_seeds(name, seeds), *compared, f"{100 * estimate.mean_G[-1]:.1f}", *scores])
    head = ["projector", f"`{OURS}` minus it", "validation", "overall", *GROUPS]
    scored = {arm for arm, _, _ in contenders}
    return markdown_table(head, rows) + left_out([arm for arm in results.arms(tokens) if arm not in scored])


def with_seeds(name: str, seeds: int) -> str:
    """A name, and the number of seeds if it is not the usual one: "mqt (3 seeds)"."""
    return name if seeds == ENOUGH_SEEDS else f"{name} ({seeds} seed{'s' if seeds > 1 else ''})"


def rivals(results: Results, tokens: str) -> dict[str, Difference]:
    """Our score minus that of every other projector at a budget, the strongest rival first."""
    ours = (OURS, "fixed", tokens)
    others = {arm: (arm, "fixed", tokens) for arm in results.arms(tokens) if arm != OURS}
    found = {other: results.difference(ours, key) for other, key in others.items() if results.comparable(ours, key)}
    return dict(sorted(found.items(), key=lambda item: item[1].estimate.mean_G[-1]))


def differences_table(title: str, found: dict[str, Difference], every_group: bool) -> str:
    """Differences with intervals and adjusted p-values; of every group, or of those in which zero is excluded."""
    adjusted, rows = corrected([difference.p for difference in found.values()]), []
    for (arm, difference), p in zip(found.items(), adjusted, strict=True):
        groups = [starred(*interval(difference.estimate, column)) for column in range(len(GROUPS))]
        clear = [f"{name} {cell[:-1]}" for name, cell in zip(GROUPS, groups, strict=True) if cell.endswith("*")]
        cells = [signed(difference, -1), "<0.001" if p < 0.0005 else number(p, 3)]
        rows.append([with_seeds(arm, difference.seeds), *cells, *(groups if every_group else [", ".join(clear)])])
    return markdown_table([title, "overall", "p", *(GROUPS if every_group else ["in groups"])], rows)


def verdict(results: Results, tokens: str) -> str:
    """What the differences at a budget say, in a few sentences."""
    found = rivals(results, tokens)
    ahead = [other for other, difference in found.items() if difference.estimate.low_G[-1] > 0]
    behind = [other for other, difference in found.items() if difference.estimate.high_G[-1] < 0]
    tested = [other for other in ahead if found[other].seeds > 1]
    confirmed = sum(found[other].validation[1] > 0 for other in tested)
    confirmation = f" (on validation scenes {confirmed} of these)" if tested else ""
    open_ = [other for other in found if other not in (*ahead, *behind)]
    worse = [
        f"{other} ({GROUPS[column]}, {100 * difference.estimate.mean_G[column]:+.1f})"
        for other, difference in found.items()
        for column in range(len(GROUPS))
        if difference.estimate.mean_G[column] < -ONE_POINT
    ]
    return (
        f"`{OURS}` is better than {len(ahead)} of {len(found)}, with an interval that excludes zero{confirmation}. "
        f"Worse than: {listed(behind)}. Undecided: {listed(open_)}. More than one percentage point behind in a group: "
        f"{listed(worse)}."
    )


def listed(names: list[str]) -> str:
    """Names with commas, or "none"."""
    return "; ".join(names) or "none"


def ablation_table(results: Results, base: str) -> str:
    """Each change to a design minus that design."""
    default = (base, "fixed", results.middle)
    keys = {arm.removesuffix(LEARNED): (arm, "fixed", results.middle) for arm in results.ablations(base)}
    found = {arm: results.difference(key, default) for arm, key in keys.items() if results.comparable(key, default)}
    table_of_changes = differences_table("change", found, False) + left_out([arm for arm in keys if arm not in found])
    return f"Each change to `{base}`, minus that design, and groups whose interval excludes zero:\n\n{table_of_changes}"


def left_out(arms: list[str]) -> str:
    """A note below a table, if any arms are missing in it."""
    return f"\n\nLeft out (too few shared seeds): {listed(arms)}." if arms else ""


def elastic_table(results: Results) -> str:
    """Weights trained with several budgets: scores, and differences from weights trained for each."""
    rows, missing = [], []
    for (mode, how), arm in product(SEVERAL.items(), ELASTIC):
        cells, seeds = [], []
        for tokens in results.budgets:
            keys = [(arm, mode, tokens), (arm, "fixed", tokens)]
            if results.comparable(*keys):
                more = results.difference(*keys)
                seeds.append(more.seeds)
                cells.append(f"{100 * results.estimates(*keys)[keys[0]].mean_G[-1]:.1f}: {signed(more, -1)}")
            elif keys[0] in results.scores:
                missing.append(f"{arm} at {tokens} tokens")
        if cells:
            rows.append([with_seeds(arm, min(seeds)), how, *cells])
    head = ["projector", "budgets in a step", *(f"{tokens} tokens" for tokens in results.budgets)]
    explained = "Scores, and what they are more than those of weights trained for that budget alone, as many steps:"
    return f"{explained}\n\n{markdown_table(head, rows)}{left_out(missing)}"


def margin_tables(results: Results) -> str:
    """Scores on blank pages by margin, our differences, and their change; nothing until seeds have all of them."""
    pairs = {name: [(arm, name, str(CELLS)) for arm in AMID_PAPER] for name in MARGINS}
    keys = [key for pair in pairs.values() for key in pair]
    if not results.comparable(*keys):
        return ""
    rows = [
        [name, arm, *(f"{100 * mean:.1f}" for mean in estimate.mean_G[[-1, *range(len(GROUPS))]])]
        for (arm, name, _), estimate in results.estimates(*keys).items()
    ]
    found = {f"{AMID_PAPER[1]}, cells {name}": results.difference(*pair) for name, pair in pairs.items()}
    found["change"] = results.change(*pairs.values())
    scores = markdown_table(["cells", "projector", "overall", *GROUPS], rows)
    return f"{scores}\n\n`{OURS}` minus the other:\n\n{differences_table('minus', found, True)}"


def world_tables(results: Results) -> str:
    """What each projector has more than the single local scope in every world, and by group what moving scopes bring;
    nothing without results.
    """
    modes = {world: "fixed" if world == EVEN else world for world in (*UNEVEN, EVEN)}
    worlds = {world: (LOCAL, mode, str(FEW)) for world, mode in modes.items() if world != EVEN}
    worlds = {world: base for world, base in worlds.items() if base in results.scores}
    if not worlds:
        return ""
    worlds[EVEN] = LOCAL, "fixed", str(FEW)
    found: dict[str, dict[str, Difference]] = {arm: {} for arm in IN_WORLDS[1:]}
    for (world, base), (arm, row) in product(worlds.items(), found.items()):
        key = arm, *base[1:]
        if results.comparable(key, base):
            row[world] = results.difference(key, base)
    scores = [f"{100 * results.estimates(base)[base].mean_G[-1]:.1f}" for base in worlds.values()]
    rows = [[arm, *(signed(row[world], -1) if world in row else "–" for world in worlds)] for arm, row in found.items()]
    moving = [
        [world, *(starred(*interval(more.estimate, column)) for column in range(len(GROUPS)))]
        for world, more in found[f"{LOCAL}, moving"].items()
    ]
    overall = markdown_table(["overall, minus the first", *worlds], [[f"{LOCAL}: score", *scores], *rows])
    return f"{overall}\n\n{markdown_table([f'`{LOCAL}, moving`', *GROUPS], moving)}"


def cost_table(results: Results) -> str:
    """Sizes, multiply-accumulates, and times as ratios to the single-scope resampler."""
    costs = results.costs
    budgets = {arm: count for arm, _, count in results.contenders(results.middle)}
    arms = {shown: shown.removesuffix(" (144 tokens)") for shown in costs["projectors"]}
    rows = [
        [
            shown,
            f"{results.parameters(arms[shown], budgets[arms[shown]]) / 1000:.0f}" if arms[shown] in budgets else "–",
            f"{cost['macs'] / 1e6:.1f}",
            f"{cost['forward_x']:.2f}",
            f"{cost['backward_x']:.2f}",
        ]
        for shown, cost in costs["projectors"].items()
    ]
    head = ["projector", "thousand parameters", "million MACs an image", "forward", "with backward"]
    return (
        f"Projectors alone, {results.middle} tokens, batch {results.study['batch_size']}, median times relative "
        f"to `{BASELINE}` in the same round. {costs['machine']}. At the published sizes overheads weigh less: "
        "[performance](performance.md#projectors).\n\n" + markdown_table(head, rows)
    )


def how_it_was_made(results: Results) -> str:
    """The commands, how much was trained, and on what."""
    hours = sum(result["seconds"] for result in results.runs) / 3600
    rows = [[made, str(count), listed_seeds(results, made)] for made, count in made_counts(results).items()]
    options = "" if results.study["ablations"] else " --no-ablations"
    return f"""## How it was made

    python -m research.study --seeds {results.study["seeds"]}{options} --report docs

{len(results.runs)} runs, {hours:.1f} hours of training on one core. `python -m research.study --check docs` checks this
page against the stored results.

{markdown_table(["made with", "runs", "seeds of `" + OURS + "`"], rows)}"""


def made_counts(results: Results) -> dict[str, int]:
    """How many runs were made with what."""
    return dict(Counter(result["made_with"] for result in results.runs))


def listed_seeds(results: Results, made: str) -> str:
    """The seeds of ms_resampler that were made with something."""
    kept = (keys for (arm, mode, _), keys in results.scores.items() if arm == OURS and mode == "fixed")
    seeds = {seed for blocks in kept for what, seed in blocks if what == made}
    return ", ".join(map(str, sorted(seeds))) or "none"
