"""The report's figures, from stored results and the generator of scenes."""

from pathlib import Path
from typing import Any

import numpy as np

from .data import GRID, PATCH_PIXELS, SPLITS, STUDY_FAMILIES, study_scene
from .plan import BASELINE, FEW, LOCAL, OURS, Study, make_projector, make_run
from .results import Results
from .run import head_sigmas
from .statistics import GROUPS
from .worlds import UNEVEN, layout_of

FIGURES = {
    "accuracy": "Score against token budget, by group of questions. Bars are 95% intervals, grey lines the other "
    "projectors; points are shifted sideways so that they do not overlap.",
    "sigmas": "Learned sigmas in token pitches, by scope: a dot for each head and seed, a line at the initial value.",
    "trust": "Fusion weight of each scope in the tokens that answer a family's questions, mean over seeds.",
    "maps": "Attention of the token over a thing (its cell is framed), by scope, on test scenes.",
    "worlds": f"Test scenes as they lie in each world, and the mean places of the {FEW} tokens of `{OURS}, moving`.",
}
# Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS = {
    OURS: "#D55E00",
    BASELINE: "#0072B2",
    LOCAL: "#56B4E9",
    "avg_pool": "#009E73",
    "token_packer": "#CC79A7",
    "mqt": "#E69F00",
}
SCOPES = {"local": "#E69F00", "regional": "#009E73", "global": "#0072B2"}  # as the demo has them
OTHERS = "#BBBBBB"


def draw_figures(results: Results, folder: Path, results_hash: str) -> None:
    """Draws all figures; each carries the hash of the results it was drawn from."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = {"accuracy": draw_accuracy, "sigmas": draw_sigmas, "trust": draw_trust, "maps": draw_maps}
    drawings |= {"worlds": draw_worlds}
    for name in figures_of(results):
        figure = drawings[name](results, pyplot)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Results": results_hash})
        pyplot.close(figure)


def figures_of(results: Results) -> dict[str, str]:
    """The figures that the results are enough for, and their captions."""
    return {name: caption for name, caption in FIGURES.items() if name != "worlds" or moved_places(results)}


def moved_places(results: Results) -> dict[str, np.ndarray]:
    """By world, the mean places (y, x) of the tokens of the first run with moving scopes on the scenes shown."""
    runs = [result for result in results.runs if result["run"]["arm"] == f"{OURS}, moving"]
    first = {result["run"]["world"]: result for result in sorted(runs, key=lambda result: -result["run"]["seed"])}
    return {world: np.array(first[world]["scopes"]["places"]) for world in UNEVEN if world in first}


def draw_worlds(results: Results, pyplot: Any) -> Any:
    """A row for each scene, a column for each world."""
    places = moved_places(results)
    shown = len(next(iter(places.values())))
    figure, panels = pyplot.subplots(
        shown, len(places), figsize=(2.4 * len(places), 2.4 * shown), layout="constrained", squeeze=False
    )
    for column, (world, places_BM2) in enumerate(places.items()):
        layout = layout_of(world, SPLITS.index("test"), results.study["data"]["test_scenes"])
        for scene, panel in enumerate(panels[:, column]):
            page = on_blank_page(np.asarray(study_scene("test", scene).image), layout.points_BN2[scene].numpy())
            panel.imshow(page, extent=(0, 1, 1, 0))
            panel.plot(places_BM2[scene, :, 1], places_BM2[scene, :, 0], "o", color="#FF00FF", markersize=4)
            panel.set(xticks=[], yticks=[], title=world if scene == 0 else "")
    return figure


def on_blank_page(picture_HW3: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
    """A scene's patches at these centres (y, x) of a page of twice the side, in grey."""
    side = 2 * GRID[0] * PATCH_PIXELS
    page = np.full((side, side, 3), 150, np.uint8)
    for patch, (y, x) in enumerate(points_N2):
        source, target = (
            np.s_[top : top + PATCH_PIXELS, left : left + PATCH_PIXELS]
            for top, left in (
                (patch // GRID[1] * PATCH_PIXELS, patch % GRID[1] * PATCH_PIXELS),
                (round(y * side - PATCH_PIXELS / 2), round(x * side - PATCH_PIXELS / 2)),
            )
        )
        page[target] = picture_HW3[source]
    return page


def draw_accuracy(results: Results, pyplot: Any) -> Any:
    """A panel for the overall mean and for each group; a line for each projector."""
    figure, panels = pyplot.subplots(1, len(GROUPS) + 1, figsize=(14, 3.8), layout="constrained")
    budgets = results.budgets[::-1]
    scored = {count: results.estimates(*results.contenders(count)) for count in budgets}
    for arm in sorted(results.arms(results.middle), key=lambda arm: arm in COLOURS):
        tokens = [tokens for tokens in budgets if (arm, "fixed", tokens) in scored[tokens]]
        estimates = [scored[count][arm, "fixed", count] for count in tokens]
        for column, panel in enumerate(panels):
            mean, low, high = (
                100 * np.array([getattr(e, key)[column - 1] for e in estimates])
                for key in ("mean_G", "low_G", "high_G")
            )
            shift = 0.08 * (list(COLOURS).index(arm) - 2.5) if arm in COLOURS else 0
            panel.errorbar(
                np.array([budgets.index(count) for count in tokens]) + shift,
                mean,
                yerr=[mean - low, high - mean] if arm in COLOURS else None,
                color=COLOURS.get(arm, OTHERS),
                label=arm if arm in COLOURS else "_",
                marker="o",
                markersize=3,
                linewidth=1.6 if arm == OURS else 1,
            )
    for title, panel in zip(("overall", *GROUPS), panels, strict=True):
        panel.set(title=title, xlabel="tokens", xticks=range(len(budgets)), xticklabels=budgets)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    return figure


def draw_sigmas(results: Results, pyplot: Any) -> Any:
    """Learned sigmas of the scopes that have one."""
    figure, axes = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    described = results.scopes(results.middle)
    began = head_sigmas(make_projector(make_run(Study(), OURS, [16], 0, 0).projector))
    for scope, name in enumerate(("local", "regional")):
        for seed, scopes in enumerate(described):
            sigma_h = scopes["sigmas"][scope]
            axes.scatter(sigma_h, np.full(len(sigma_h), scope) + 0.08 * (seed - 2), color=SCOPES[name], s=14)
        axes.vlines(began[scope][0], scope - 0.4, scope + 0.4, color="black", linewidth=1)
    axes.set(xlabel="sigma (token pitches)", yticks=(0, 1), yticklabels=("local", "regional"), ylim=(-0.6, 1.6))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_trust(results: Results, pyplot: Any) -> Any:
    """A bar for each family: the shares of local, regional and global."""
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    described = results.scopes(results.middle)
    trust_FS = np.mean([[scopes["trust"][family] for family in STUDY_FAMILIES] for scopes in described], axis=0)
    start = np.zeros(len(STUDY_FAMILIES))
    for scope, (name, colour) in enumerate(SCOPES.items()):
        axes.barh(list(STUDY_FAMILIES), trust_FS[:, scope], left=start, color=colour, label=name)
        start += trust_FS[:, scope]
    axes.set(xlabel="fusion weight", xlim=(0, 1))
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_maps(results: Results, pyplot: Any) -> Any:
    """For a few scenes: the picture, and where the token over its first thing looked in each scope."""
    maps = results.scopes(results.middle)[0]["maps"]
    scenes, scopes, tokens, _ = maps["shape"]
    weights_BSM = np.frombuffer(bytes.fromhex(maps["weights"]), np.uint8).reshape(scenes, scopes, tokens)
    attention = np.frombuffer(bytes.fromhex(maps["attentions"]), np.uint8).reshape(scenes, scopes, tokens, *GRID)
    figure, panels = pyplot.subplots(
        scenes, scopes + 1, figsize=(2.2 * (scopes + 1), 2.2 * scenes), layout="constrained"
    )
    side = round(tokens**0.5)
    pitch = GRID[0] * PATCH_PIXELS / side
    for scene, row in enumerate(panels):
        drawn = study_scene("test", scene)
        picture, (x, y) = drawn.image, drawn.things[0].centre
        token = int(y // pitch) * side + int(x // pitch)
        corner = (token % side * pitch, token // side * pitch)
        for scope, panel in enumerate(row, start=-1):
            panel.imshow(picture)
            panel.add_patch(pyplot.Rectangle(corner, pitch, pitch, fill=False, edgecolor="#FF00FF", linewidth=1.5))
            panel.set(xticks=[], yticks=[], title="picture")
            if scope >= 0:
                extent = (0, picture.width, picture.height, 0)
                panel.imshow(attention[scene, scope, token], alpha=0.75, cmap="viridis", extent=extent)
                panel.set_title(f"{list(SCOPES)[scope]}: weight {weights_BSM[scene, scope, token]}%")
    return figure
