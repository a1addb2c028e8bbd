"""The report: `study.md` and its figures, made of stored results alone, so that it can be checked against them."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ms_resampler.folders import write_whole
from ms_resampler.timing import markdown_table

from .figures import FIGURES, draw_figures
from .plan import ABLATIONS, AMID_PAPER, BASELINE, CELLS, ELASTIC, LEARNED, LOCAL, MARGINS, OURS, REFERENCE, RELATIVES
from .results import ENOUGH_SEEDS, Results, fingerprint, load
from .statistics import GROUPS, Difference, Estimate, corrected

ONE_POINT = 0.01
MARGINS_EXPLAINED = """The centres of things lie in 3 x 3 places, one at most in each. So with 9 tokens, and with no
other budget here, a window of TokenPacker, or a cell of ours, is such a place, and a token tells of little but one
thing. What is that worth? The same scenes again, amid paper, on 16 x 16 patches with 16 tokens, so that cells are as
large as those of 9 tokens above: with all paper to the right and below, cells are the places, and with two patches of
it on every side each place lies across four cells. (Then all 16 cells hold a part of the scene, otherwise nine do: that
differs, too.) Learning rates are those of above."""
PRELIMINARY = (
    "\n\n**Preliminary: the tables of scores are over {seeds}.** Seeds differ by about as much as neighbours in these "
    "tables do, so conclusions wait for five."
)


def write_report(folder: Path) -> None:
    """Writes `FOLDER/study.md` and `FOLDER/study/*.png` from the results in `FOLDER/study`."""
    results = load(folder / "study")
    draw_figures(results, folder / "study", results_hash(folder))
    write_whole(folder / "study.md", report_text(results))


def check_report(folder: Path) -> None:
    """Raises ValueError if the report or a figure is not that of the stored results."""
    if not (folder / "study.md").exists() or (folder / "study.md").read_text(encoding="utf-8") != report_text(
        load(folder / "study")
    ):
        raise ValueError(f"{folder / 'study.md'} is not the report of the results beside it: write it again.")
    for name in FIGURES:
        path = folder / "study" / f"{name}.png"
        if not path.exists() or drawn_from(path) != results_hash(folder):
            raise ValueError(f"{path} was not drawn from the results beside it: write the report again.")


def results_hash(folder: Path) -> str:
    """A hash of the stored results, which the figures carry."""
    return fingerprint(folder / "study" / "study.json", folder / "study" / "runs.jsonl")


def drawn_from(path: Path) -> str | None:
    """The hash of the results that a figure carries."""
    with Image.open(path) as picture:
        return picture.info.get("Results")


def report_text(results: Results) -> str:
    """The whole report, in Markdown."""
    sections = [introduction(results)]
    for tokens in results.budgets:
        sections += [f"## {tokens} tokens", main_table(results, tokens), verdict(results, tokens)]
        sections += [
            f"`{OURS}` minus each of the others, in points:",
            differences_table("minus", rivals(results, tokens)),
        ]
    sections += ["## Figures", *(f"![{caption}](study/{name}.png)\n\n{caption}" for name, caption in FIGURES.items())]
    ablations = [ablation_table(results, base) for base in RELATIVES if results.ablations(base)]
    if ablations:
        sections += [f"## Ablations, {results.middle} tokens", *ablations]
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

The claim: at a fixed budget of tokens, several resamplers, each with a spatial scope of its own and adaptively fused,
beat one global resampler. It would be refuted by a single-scope resampler, global *or local*, that is as good on every
task at equal or lower cost. Average pooling and TokenPacker are the other peers to beat. This page is made by
`ms-resampler study` from the results in [study/](study), whatever they say.{preliminary}

**Conditions.** A small, controlled setting: {data["train_scenes"]:,} scenes of one to nine handwritten digits, shapes
and words on 12 x 12 patches. A ConvNeXt tower has learned to name what is under each patch and is frozen; codes of
their places are added to its features, as those of a ViT carry them. A reader of two layers, which stands in for the
language model, has learned its questions on descriptions in words. Neither ever met a projector. For each run a fresh
projector and a copy of that reader are trained together for {study["steps"]} steps of {study["batch_size"]} pictures
with eight questions each. Every projector has the same choice of learning rates
({rates}), by validation scores at {results.middle} tokens (`{LOCAL}`, which is `{OURS}` with one scope, takes
the rate of `{OURS}`), and a width that gives it about the parameters of `{BASELINE}`, where it has a width (the
perceivers are as wide as what they read or write). The digits of the test were seen by neither tower, reader nor
projector.

**Scores.** On {data["test_scenes"]} held-out scenes: questions that need a local (read, colour, shape), regional
(presence, where, relation, compare) or global look (count, count of a colour, majority), exact answers; and *dense*:
the share of patches whose name and colour can be read back from the tokens. Groups are means of their families; overall
is the mean of the four groups. Intervals are 95% bootstrap intervals over pictures and seeds; differences are paired,
by seed and picture; p-values are t-tests over seeds, adjusted for their number in each table (Benjamini and Hochberg);
d is Cohen's, over three seeds or more. Where tower and reader were trained more than once, or runs made on several
kinds of machine, runs are compared with those of the same only ([how it was made](#how-it-was-made)): a table of scores
is over the seeds that all its rows share, a difference over all that its two sides share. Our own design was chosen by
looking at scores of these pictures, with two of the seeds ([log](log.md)), those of the peers are as published: that
speaks for us. So differences have a column of the {data["validation_scenes"]} *validation* pictures, too, of other
digits again, which chose nothing but learning rates: overall, with its 95% t-interval over seeds."""


def percent(estimate: Estimate, column: int) -> str:
    """A mean and its interval: "81.2 (80.1 to 82.0)"."""
    mean, low, high = (100 * part[column] for part in (estimate.mean_G, estimate.low_G, estimate.high_G))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def signed(difference: Difference, column: int) -> str:
    """A difference in points and its interval: "+1.2 (+0.3 to +2.0)"."""
    parts = (difference.estimate.mean_G, difference.estimate.low_G, difference.estimate.high_G)
    return signed_interval(*(part[column] for part in parts))


def signed_interval(mean: float, low: float, high: float) -> str:
    """The same of three numbers; of a single seed, which has no interval, the mean alone."""
    interval = "" if np.isnan(low) else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * mean:+.1f}{interval}"


def number(value: float, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def main_table(results: Results, tokens: str) -> str:
    """Scores of all projectors at a budget, the best first; the MLP keeps all patches, whatever the budget."""
    contenders = results.contenders(tokens)
    scored, seeds = results.estimates(*contenders), len(results.blocks(*contenders))
    rows = [
        [
            f"{arm} (144 tokens)" if arm in REFERENCE else f"**{arm}**" if arm == OURS else arm,
            f"{results.parameters(arm, count) / 1000:.0f}",
            f"{results.rates[arm]:g}",
            str(seeds),
            percent(estimate, -1),
            *(f"{100 * estimate.mean_G[column]:.1f}" for column in range(len(GROUPS))),
        ]
        for (arm, _, count), estimate in sorted(scored.items(), key=lambda item: -item[1].mean_G[-1])
    ]
    head = ["projector", "thousand parameters", "learning rate", "seeds", "overall", *GROUPS]
    return markdown_table(head, rows) + left_out(
        [arm for arm in results.arms(tokens) if (arm, "fixed", tokens) not in scored]
    )


def rivals(results: Results, tokens: str) -> dict[str, Difference]:
    """Our score minus that of every other projector at a budget, the strongest rival first."""
    ours = (OURS, "fixed", tokens)
    others = {arm: (arm, "fixed", tokens) for arm in results.arms(tokens) if arm != OURS}
    found = {other: results.difference(ours, key) for other, key in others.items() if results.comparable(ours, key)}
    return dict(sorted(found.items(), key=lambda item: item[1].estimate.mean_G[-1]))


def differences_table(title: str, found: dict[str, Difference]) -> str:
    """Differences with intervals, adjusted p-values and effect sizes."""
    adjusted = corrected([difference.p for difference in found.values()])
    rows = [
        [
            arm,
            str(difference.seeds),
            signed(difference, -1),
            "<0.001" if p < 0.0005 else number(p, 3),
            number(difference.effect, 1),
            signed_interval(*difference.validation),
            *(signed(difference, column) for column in range(len(GROUPS))),
        ]
        for (arm, difference), p in zip(found.items(), adjusted, strict=True)
    ]
    return markdown_table([title, "seeds", "overall", "p", "d", "validation", *GROUPS], rows)


def verdict(results: Results, tokens: str) -> str:
    """What the differences at a budget say, in a few sentences."""
    found = rivals(results, tokens)
    ahead = [other for other, difference in found.items() if difference.estimate.low_G[-1] > 0]
    behind = [other for other, difference in found.items() if difference.estimate.high_G[-1] < 0]
    tested = [other for other in ahead if found[other].seeds > 1]
    confirmed = sum(found[other].validation[1] > 0 for other in tested)
    confirmation = (
        f"Of those it leads, {confirmed} are behind on validation pictures, too, zero excluded. " if tested else ""
    )
    open_ = [other for other in found if other not in (*ahead, *behind)]
    worse = [
        f"{other} ({GROUPS[column]}, {100 * difference.estimate.mean_G[column]:+.1f})"
        for other, difference in found.items()
        for column in range(len(GROUPS))
        if difference.estimate.mean_G[column] < -ONE_POINT
    ]
    return (
        f"At {tokens} tokens `{OURS}` is ahead of {len(ahead)} of {len(found)} with an interval that excludes zero "
        f"({listed(ahead)}), behind {len(behind)} ({listed(behind)}), and not told apart from {len(open_)} "
        f"({listed(open_)}). {confirmation}More than a point behind in a group: {listed(worse)}."
    )


def listed(names: list[str]) -> str:
    """Names with commas, or "none"."""
    return "; ".join(names) or "none"


def ablation_table(results: Results, base: str) -> str:
    """Each change to a design, minus that; its relatives among the projectors, too."""
    default = (base, "fixed", results.middle)
    relatives = [arm for arm in results.arms(results.middle) if arm in RELATIVES[base]]
    keys = {arm: (arm, "fixed", results.middle) for arm in (*relatives, *results.ablations(base))}
    found = {arm: results.difference(key, default) for arm, key in keys.items() if results.comparable(key, default)}
    labels = {arm: arm.removesuffix(LEARNED) if arm in ABLATIONS else arm for arm in keys}
    table_of_changes = differences_table("change", {labels[arm]: difference for arm, difference in found.items()})
    table_of_changes += left_out([labels[arm] for arm in keys if arm not in found])
    return f"Each change to `{base}`, minus that, in points:\n\n{table_of_changes}"


def left_out(arms: list[str]) -> str:
    """A note below a table, if any arms are missing in it."""
    return f"\n\nLeft out, because too few seeds are shared yet: {listed(arms)}." if arms else ""


def elastic_table(results: Results) -> str:
    """Weights trained with random budgets beside weights trained for each."""
    rows, missing = [], []
    for arm, tokens in product(ELASTIC, results.budgets):
        keys = [(arm, mode, tokens) for mode in ("elastic", "fixed")]
        if results.comparable(*keys):
            elastic, fixed = results.estimates(*keys).values()
            rows.append([arm, tokens, percent(elastic, -1), percent(fixed, -1), signed(results.difference(*keys), -1)])
        elif keys[0] in results.scores:
            missing.append(f"{arm} at {tokens} tokens")
    head = ["projector", "tokens", "trained with random budgets", "trained for this budget", "difference"]
    return markdown_table(head, rows) + left_out(missing)


def margin_tables(results: Results) -> str:
    """Scores amid paper by margin, our differences, and what they change by; nothing before seeds have all of them."""
    pairs = {name: [(arm, name, str(CELLS)) for arm in AMID_PAPER] for name in MARGINS}
    keys = [key for pair in pairs.values() for key in pair]
    if not results.comparable(*keys):
        return ""
    rows = [
        [name, arm, percent(estimate, -1), *(percent(estimate, column) for column in range(len(GROUPS)))]
        for (arm, name, _), estimate in results.estimates(*keys).items()
    ]
    found = {f"{AMID_PAPER[1]}, cells {name}": results.difference(*pair) for name, pair in pairs.items()}
    found["what that changes by"] = results.change(*pairs.values())
    scores = markdown_table(["cells", "projector", "overall", *GROUPS], rows)
    return f"{scores}\n\n`{OURS}` minus the other, in points:\n\n{differences_table('minus', found)}"


def cost_table(results: Results) -> str:
    """Multiply-accumulates and times, as ratios to the single-scope resampler in the same run."""
    costs = results.costs
    rows = [
        [
            arm,
            f"{cost['macs'] / 1e6:.1f}",
            *(f"{cost[key]:.2f}" for key in ("forward", "backward", "forward_x", "backward_x")),
        ]
        for arm, cost in costs["projectors"].items()
    ]
    head = ["projector", "million MACs an image", "forward, ms", "and backward, ms", "forward, x", "and backward, x"]
    return (
        f"Of the projectors alone, {results.middle} tokens, batch {results.study['batch_size']}, medians of "
        f"repeats in turn; x is relative to `{BASELINE}` in the same round. {costs['machine']}. At these small sizes "
        "overheads weigh more than at published ones, which `python research/benchmarks/projectors.py` measures.\n\n"
        + markdown_table(head, rows)
    )


def how_it_was_made(results: Results) -> str:
    """The commands, how much was trained, and on what."""
    hours = sum(result["seconds"] for result in results.runs) / 3600
    rows = [[made, str(count), listed_seeds(results, made)] for made, count in made_counts(results).items()]
    options = "" if results.study["ablations"] else " --no-ablations"
    return f"""## How it was made

    ms-resampler study --seeds {results.study["seeds"]}{options} --report docs

{len(results.runs)} runs, {hours:.1f} hours of training on one core. `ms-resampler study --check docs` holds this page
against the stored results.

{markdown_table(["made with", "runs", "seeds of `" + OURS + "`"], rows)}"""


def made_counts(results: Results) -> dict[str, int]:
    """How many runs were made with what."""
    return dict(Counter(result["made_with"] for result in results.runs))


def listed_seeds(results: Results, made: str) -> str:
    """The seeds of ms_resampler that were made with something."""
    kept = (keys for (arm, mode, _), keys in results.scores.items() if arm == OURS and mode == "fixed")
    seeds = {seed for blocks in kept for what, seed in blocks if what == made}
    return ", ".join(map(str, sorted(seeds))) or "none"
