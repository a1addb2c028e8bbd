"""The study's runs: projectors and ablations, token budgets, seeds and learning rates."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import torch

from ms_resampler.configuration_ms_resampler import MSResamplerConfig, token_grid
from ms_resampler.modeling_ms_resampler import MSResamplerModel
from ms_resampler.projectors_ms_resampler import PROJECTORS

from ..variants import ToldSpace, complete_fields, configuration
from .data import CHANNELS, GRID, PATCH_PIXELS, PATCHES, DataSettings, digest
from .reader import WIDTH
from .worlds import EVEN, MARGINS, UNEVEN, grid_of

LOCAL = "resampler, local"  # ms_resampler with one scope, and its learning rate
LEARNED = ", learned queries"
OURS, BASELINE, WITH_QUERIES = "ms_resampler", "resampler", "ms_resampler" + LEARNED
HEADS = 8
VERSION = 2  # version of how runs are made; changing it invalidates results
WIDTHS = range(4 * HEADS, 256 + 1, HEADS)

# Projectors by name: their fields beside width and budget, as results are stored (research/variants.py). Depths are
# smaller than published, so that widths need not be.
PEERS: dict[str, dict[str, Any]] = {
    OURS: {},
    BASELINE: {"projector_type": "resampler"},
    LOCAL: {"projector_type": "resampler", "scope_sigmas": [0.5], "query_init": "none"},
    "resampler, local, learned queries": {"projector_type": "resampler", "scope_sigmas": [0.5]},
    "resampler, regional, learned queries": {"projector_type": "resampler", "scope_sigmas": [1.5]},
    WITH_QUERIES: {"query_init": "learned"},
    # The literal reading of the claim: a resampler for each scope.
    "ms_resampler, branches": {"scope_layout": "branches", "fusion": "head", "cell_residual": False},
    # The usual resampler. With one scope, layout and fusion have no effect.
    "resampler, no cell mean": {
        "projector_type": "resampler",
        "scope_layout": "branches",
        "fusion": "head",
        "cell_residual": False,
    },
    **{name: {"projector_type": name} for name in PROJECTORS if name != "mlp"},
}
PEERS["q_former"]["num_hidden_layers"] = 2  # every second layer attends to patches
# The MLP keeps every patch: the result without a budget.
REFERENCE: dict[str, dict[str, Any]] = {"mlp": {"projector_type": "mlp"}}

# Changes to ms_resampler and to it with learned queries, one at a time.
CHANGES: dict[str, dict[str, Any]] = {
    "two scopes": {"scope_sigmas": [0.5, None]},
    "four scopes": {"scope_sigmas": [0.35, 0.8, 2.0, None]},
    "window prior": {"scope_prior": "window", "learn_scopes": False, "prior_form": "bias"},
    "no prior": {"scope_prior": "none", "learn_scopes": False},
    "fixed sigmas": {"learn_scopes": False},
    "heads all alike": {"tile_heads": False},
    "even shares of heads": {"scope_heads": [3, 3, 2]},
    "no cell mean": {"cell_residual": False},
    "no patch convolution": {"patch_conv": False},
    "static fusion": {"fusion": "static"},
    "mean fusion": {"fusion": "mean"},
    "branches": {"scope_layout": "branches"},
    "branches, separate keys and values": {"scope_layout": "branches", "share_kv": False},
    "content queries": {"query_init": "content"},
    "two layers": {"num_hidden_layers": 2},
    "three quarters as wide": {"hidden_size": 3 * WIDTH // 4, "intermediate_size": 3 * WIDTH // 4},
}
# Without queries, scopes share the heads, only the prior distinguishes tokens, and the width differs.
WITH_QUERIES_ONLY = {"no prior", "branches", "branches, separate keys and values", "content queries"}
WITH_QUERIES_ONLY |= {"three quarters as wide"}
# By name: the projector that is changed, and the change.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{change: (OURS, fields) for change, fields in CHANGES.items() if change not in WITH_QUERIES_ONLY},
    "one regional scope": (OURS, PEERS[LOCAL] | {"scope_sigmas": [1.5]}),
    **{change + LEARNED: (WITH_QUERIES, fields) for change, fields in CHANGES.items()},
}
# Trained with a random grid each step, and evaluated at every budget.
ELASTIC = (OURS, WITH_QUERIES, "mqt", "avg_pool")
TOGETHER = (OURS,)  # also with all budgets in every step, which costs as much as a training for each
# Scenes on a blank page, where 16 tokens have cells as large as those of 9 tokens without it. Things lie on 3 x 3
# places: depending on the margin above and left, a cell is a place, or a place spans four cells.
AMID_PAPER, CELLS = (OURS, "token_packer"), 16
# Scopes that move to the information, by name: the projector that is changed, and the change.
MOVING: dict[str, tuple[str, dict[str, Any]]] = {
    f"{arm}, moving": (arm, {"projector_type": "ms_resampler", "moving_scopes": True}) for arm in (LOCAL, OURS)
}
# An oracle, whose scopes move to where the scene is, without having to learn it.
TOLD = f"{LOCAL}, told where"
MOVING[TOLD] = LOCAL, MOVING[f"{LOCAL}, moving"][1] | {"told": True}
CHANGED = ABLATIONS | MOVING
# What is compared where information is spread unevenly; the first is the base of differences.
IN_WORLDS, FEW, WORLD_SEEDS = (LOCAL, OURS, *MOVING, BASELINE, "token_packer"), 9, 5


@dataclass(frozen=True)
class Study:
    """The complete settings of a study."""

    arms: tuple[str, ...] = (*PEERS, *REFERENCE)
    budgets: tuple[int, ...] = (36, 16, 9)
    seeds: int = 5
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    steps: int = 600
    batch_size: int = 32
    ablations: bool = True
    data: DataSettings = field(default_factory=DataSettings)

    @property
    def middle(self) -> int:
        """The budget at which learning rates are chosen, and ablations compared."""
        return sorted(self.budgets)[len(self.budgets) // 2]


QUICK = Study(
    arms=(OURS, BASELINE, LOCAL, "avg_pool", "token_packer", "mqt"),
    budgets=(16,),
    seeds=2,
    learning_rates=(2e-3,),
    steps=250,
    ablations=False,
    data=DataSettings(train_scenes=4_000, tower_steps=500, reader_steps=1_500),
)


@dataclass(frozen=True)
class Run:
    """One training run: everything that determines its result.

    `grids` are the token grids trained and tested: one at random each step, or `together` all of them.
    """

    arm: str
    projector: dict[str, Any]  # complete, so that results do not depend on defaults
    grids: tuple[tuple[int, int], ...]
    seed: int
    learning_rate: float
    steps: int
    batch_size: int
    data: DataSettings
    world: str = EVEN
    together: bool = False

    @property
    def name(self) -> str:
        """The name of the result: a hash of everything but the arm's name."""
        fields = {"version": VERSION, **dataclasses.asdict(self), "arm": None}
        # As before there were worlds, and budgets together.
        if not self.together:
            del fields["together"]
        if self.world == EVEN:
            del fields["world"]
        elif self.world in MARGINS:
            fields["margin"] = MARGINS[fields.pop("world")]
        return digest(fields)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """The patches of a picture."""
        return grid_of(self.world)

    @property
    def tokens(self) -> str:
        """The readable budget: "16", or "9 to 36"."""
        counts = sorted(rows * columns for rows, columns in self.grids)
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def fields_of(arm: str) -> dict[str, Any]:
    """The projector fields of an arm. Raises ValueError for an unknown arm."""
    known = PEERS | REFERENCE | {name: PEERS[base] | fields for name, (base, fields) in CHANGED.items()}
    if arm not in known:
        raise ValueError(f"The study knows no projector {arm!r}; it knows {', '.join(known)}.")
    return known[arm]


def make_run(
    study: Study,
    arm: str,
    budgets: Sequence[int],
    seed: int,
    learning_rate: float,
    world: str = EVEN,
    together: bool = False,
) -> Run:
    """The run of an arm, at a budget or (elastic) at several. The projector's width makes its number of
    parameters comparable; it is the same at every budget except for the tokens.
    """
    grids = tuple(token_grid(PATCHES if arm in REFERENCE else budget, grid_of(world)) for budget in budgets)
    largest = max(grids)
    projector = {**size_of(arm), **fields_of(arm), "query_grid": largest, "visual_tokens": largest}
    of_study = study.steps, study.batch_size, study.data
    return Run(arm, complete_fields(projector), grids, seed, learning_rate, *of_study, world, together)


def size_of(arm: str) -> dict[str, int]:
    """Width, heads and FFN of an arm, for a comparable number of parameters; an ablation's are those of its base."""
    return sizes(matched_width(changed_by(arm)))


def changed_by(arm: str) -> str:
    """The projector that an arm changes, whose width and learning rate it has; a projector itself."""
    return CHANGED[arm][0] if arm in CHANGED else arm


def sizes(width: int) -> dict[str, int]:
    """Width, heads and FFN of a projector of this width."""
    return {"hidden_size": width, "intermediate_size": width, "num_attention_heads": HEADS}


@cache
def matched_width(arm: str) -> int:
    """The width with the number of parameters nearest, to a percent, to that of a resampler of the reader's width.

    Of several, or without a free width, the one nearest to the reader's.
    """
    grid = token_grid(16, GRID)
    aim = count_parameters(PEERS[BASELINE] | {"query_grid": grid, "visual_tokens": grid} | sizes(WIDTH))
    tokens = GRID if arm in REFERENCE else grid
    fields = {**fields_of(arm), "query_grid": tokens, "visual_tokens": tokens}
    counts = {width: count_parameters(fields | sizes(width)) for width in WIDTHS}
    return min(counts, key=lambda width: (round(abs(math.log(counts[width] / aim)), 2), abs(width - WIDTH)))


def model_config(projector: dict[str, Any], patch_grid: tuple[int, int]) -> MSResamplerConfig:
    """A model with the study's tower and a projector; of its language model only the width counts."""
    return MSResamplerConfig(
        vision_config={
            "model_type": "convnext",
            "image_size": patch_grid[0] * PATCH_PIXELS,
            "patch_size": PATCH_PIXELS,
            "num_stages": 1,
            "depths": [1],
            "hidden_sizes": [CHANNELS],
        },
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 8,
        },
        projector_config=configuration(projector),
        image_token_id=7,
        vision_feature_layer=-1,
    )


def make_projector(projector: dict[str, Any], patch_grid: tuple[int, int] = GRID) -> torch.nn.Module:
    """The initialised projector."""
    fields = {name: value for name, value in projector.items() if name != "told"}
    made: Any = MSResamplerModel(model_config(fields, patch_grid)).projector
    if "told" in projector:
        made.space.__class__ = ToldSpace  # with the weights it was given
    return made


def count_parameters(projector: dict[str, Any]) -> int:
    """Parameters of a projector."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in make_projector(projector).parameters())


def rehearse(study: Study) -> None:
    """Runs every projector once at every budget, and raises ValueError before hours of training if one fails."""
    for run in main_runs(dataclasses.replace(study, seeds=1), dict.fromkeys(study.arms, 0.0)):
        make_projector(run.projector)(torch.zeros(1, PATCHES, CHANNELS), GRID, run.grids[0])


def sweep_runs(study: Study) -> list[Run]:
    """The learning rates of every projector but LOCAL, at the middle budget, seed 0. One rate needs no sweep."""
    if len(study.learning_rates) == 1:
        return []
    swept = [arm for arm in study.arms if arm != LOCAL]
    return [make_run(study, arm, [study.middle], 0, rate) for arm in swept for rate in study.learning_rates]


def main_runs(study: Study, rates: dict[str, float]) -> list[Run]:
    """Every projector at every budget with every seed; ordered by seed, so that a part is a smaller study."""
    return [
        make_run(study, arm, [budget], seed, rates[arm])
        for seed in range(study.seeds)
        for budget in study.budgets
        for arm in study.arms
        if arm not in REFERENCE or budget == study.budgets[0]
    ]


def further_runs(study: Study, rates: dict[str, float]) -> list[Run]:
    """Ablations at the middle budget, with the learning rate of what they change; and elastic runs."""
    if not study.ablations:
        return []
    ablations = [arm for arm in ABLATIONS if changed_by(arm) in rates]
    elastic = [
        (arm, together) for together, arms in ((False, ELASTIC), (True, TOGETHER)) for arm in arms if arm in rates
    ]
    seeds = range(study.seeds)
    return [
        *(
            make_run(study, arm, [study.middle], seed, rates[changed_by(arm)])
            for seed, arm in product(seeds, ablations)
        ),
        *(
            make_run(study, arm, study.budgets, seed, rates[arm], together=together)
            for seed, (arm, together) in product(seeds, elastic)
        ),
    ]


def margin_runs(study: Study, rates: dict[str, float]) -> list[Run]:
    """The runs on blank pages, if the study has all projectors that are compared there."""
    if not study.ablations or not rates.keys() >= set(AMID_PAPER):
        return []
    asked = product(range(study.seeds), AMID_PAPER, MARGINS)
    return [make_run(study, arm, [CELLS], seed, rates[arm], world) for seed, arm, world in asked]


def world_runs(study: Study, rates: dict[str, float]) -> list[Run]:
    """The runs where information is spread unevenly, and evenly; ordered by seed, so that a part is a smaller study."""
    if not study.ablations or not rates.keys() >= {changed_by(arm) for arm in IN_WORLDS}:
        return []
    asked = product(range(min(study.seeds, WORLD_SEEDS)), (*UNEVEN, EVEN), IN_WORLDS)
    return [
        make_run(study, arm, [FEW], seed, rates[changed_by(arm)], world)
        for seed, world, arm in asked
        if (arm, world) != (TOLD, EVEN)  # there is nothing to tell
    ]
