"""The report: `study.md` and its figures, made of stored results alone, so that it can be checked against them."""

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from ms_resampler.folders import write_whole

from ..timing import markdown_table
from .figures import FIGURES, draw_figures
from .plan import ABLATIONS, AMID_PAPER, BASELINE, CELLS, ELASTIC, LEARNED, LOCAL, MARGINS, OURS, REFERENCE, RELATIVES
from .results import ABOUT, ENOUGH_SEEDS, RUNS, Results, fingerprint, load, results_folder
from .statistics import GROUPS, Difference, Estimate, corrected

ONE_POINT = 0.01
MARGINS_EXPLAINED = """Things have their centres in 3 x 3 places, at most one in each. With 9 tokens, and no other
budget here, a window of TokenPacker, or a cell of ours, is exactly one such place, so each token describes mostly one
thing. To measure what that is worth, the same scenes are embedded in blank paper, 16 x 16 patches in all, with 16
tokens: cells are then as large as those of 9 tokens above. With all the paper to the right and below, cells coincide
with places; with two patches of paper on every side, each place is spread over four cells. (All 16 cells then hold
part of the scene, and nine of them otherwise, which is a second difference.) Learning rates are those above."""
PRELIMINARY = (
    "\n\n**Preliminary: the score tables cover {seeds}.** Seeds differ by about as much as neighbouring rows do, so "
    "conclusions need five."
)
EXCLUDES_ZERO = "In these tables * marks a difference by group whose 95% interval excludes zero."


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
    for name in FIGURES:
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
        sections += [
            f"`{OURS}` minus each of the others:",
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

The claim: at a fixed token budget, several resamplers, each with its own spatial scope, fused adaptively, beat one
global resampler. A single-scope resampler, global *or local*, that is as good on every task at equal or lower cost
would refute it. Average pooling and TokenPacker are the other peers to beat. `python -m research.study` writes this
page from the stored results.{preliminary}

**Setting.** {data["train_scenes"]:,} synthetic scenes of one to nine handwritten digits, shapes and words on 12 x 12
patches. A ConvNeXt tower, trained to name what is under each patch, is frozen; position codes are added to its
features, as in a ViT. A two-layer reader stands in for the language model; it was trained on textual descriptions of
scenes. Neither has seen a projector's output. Each run trains a new projector together with a copy of that reader,
for {study["steps"]} steps of {study["batch_size"]} images with eight questions each. Every projector gets the same
learning rates to choose from ({rates}), by validation score at {results.middle} tokens; `{LOCAL}`, which is `{OURS}`
with one scope, uses the rate of `{OURS}`. Widths are chosen so that parameter counts match `{BASELINE}`, where a
projector has a width (the perceivers are as wide as their input or output). Test scenes use digits that neither
tower, reader nor projector has seen.

**Scores.** On {data["test_scenes"]} test scenes: exact answers to questions that need a local (read, colour, shape),
regional (presence, where, relation, compare) or global view (count, count of a colour, majority), and *dense*: the
share of patches whose name and colour can be predicted from the tokens. A group's score is the mean of its question
families; overall is the mean of the four groups. Intervals are 95% bootstrap intervals over images and seeds.
Differences are in percentage points and paired by seed and image. p-values are t-tests over seeds, adjusted for
multiple comparisons within each table (Benjamini and Hochberg); d is Cohen's d, given from three seeds on. Runs are
compared only with runs of the same tower, reader and kind of machine ([how it was made](#how-it-was-made)): a table
of scores covers the seeds that all its rows share, a difference those that its two sides share. The design of
`{OURS}` was chosen by looking at scores of these test scenes with two of the seeds ([log](../research/log.md)), which
favours it over peers built as published. Differences are therefore also given for {data["validation_scenes"]}
*validation* scenes, with other digits again, which chose nothing but learning rates: overall, with a 95% t-interval
over seeds. {EXCLUDES_ZERO}"""


def percent(estimate: Estimate, column: int) -> str:
    """A mean and its interval: "81.2 (80.1 to 82.0)"."""
    mean, low, high = (100 * part[column] for part in (estimate.mean_G, estimate.low_G, estimate.high_G))
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def signed(difference: Difference, column: int) -> str:
    """A difference in percentage points and its interval: "+1.2 (+0.3 to +2.0)"."""
    parts = (difference.estimate.mean_G, difference.estimate.low_G, difference.estimate.high_G)
    return signed_interval(*(part[column] for part in parts))


def starred(estimate: Estimate, column: int) -> str:
    """A difference in percentage points, with a star where its interval excludes zero: "+1.2*"."""
    star = "*" if estimate.low_G[column] > 0 or estimate.high_G[column] < 0 else ""
    return f"{100 * estimate.mean_G[column]:+.1f}{star}"


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
            *(starred(difference.estimate, column) for column in range(len(GROUPS))),
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
        f"On validation scenes, too, {confirmed} of those are behind it with an interval that excludes zero. "
        if tested
        else ""
    )
    open_ = [other for other in found if other not in (*ahead, *behind)]
    worse = [
        f"{other} ({GROUPS[column]}, {100 * difference.estimate.mean_G[column]:+.1f})"
        for other, difference in found.items()
        for column in range(len(GROUPS))
        if difference.estimate.mean_G[column] < -ONE_POINT
    ]
    return (
        f"At {tokens} tokens `{OURS}` is ahead of {len(ahead)} of {len(found)} with an interval that excludes zero. "
        f"{confirmation}It is behind: {listed(behind)}. Interval includes zero: {listed(open_)}. More than one "
        f"percentage point behind in a group: {listed(worse)}."
    )


def listed(names: list[str]) -> str:
    """Names with commas, or "none"."""
    return "; ".join(names) or "none"


def ablation_table(results: Results, base: str) -> str:
    """Each change to a design minus that design, with its relatives among the projectors."""
    default = (base, "fixed", results.middle)
    relatives = [arm for arm in results.arms(results.middle) if arm in RELATIVES[base]]
    keys = {arm: (arm, "fixed", results.middle) for arm in (*relatives, *results.ablations(base))}
    found = {arm: results.difference(key, default) for arm, key in keys.items() if results.comparable(key, default)}
    labels = {arm: arm.removesuffix(LEARNED) if arm in ABLATIONS else arm for arm in keys}
    table_of_changes = differences_table("change", {labels[arm]: difference for arm, difference in found.items()})
    table_of_changes += left_out([labels[arm] for arm in keys if arm not in found])
    return f"Each change to `{base}`, minus that design:\n\n{table_of_changes}"


def left_out(arms: list[str]) -> str:
    """A note below a table, if any arms are missing in it."""
    return f"\n\nLeft out (too few shared seeds): {listed(arms)}." if arms else ""


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
    found["change"] = results.change(*pairs.values())
    scores = markdown_table(["cells", "projector", "overall", *GROUPS], rows)
    return f"{scores}\n\n`{OURS}` minus the other:\n\n{differences_table('minus', found)}"


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
        f"Projectors alone, {results.middle} tokens, batch {results.study['batch_size']}, medians of interleaved "
        f"repeats; x is relative to `{BASELINE}` in the same round. {costs['machine']}. At these small sizes overheads "
        "weigh more than at published ones, which `python -m research.benchmarks.projectors` measures.\n\n"
        + markdown_table(head, rows)
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
