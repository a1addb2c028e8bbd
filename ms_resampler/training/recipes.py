"""Recipes: functions that return complete training configurations, listed by name in `RECIPES`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class LearningRates:
    """The peak learning rate of each part of a model; None freezes the part."""

    tower: float | None = None
    projector: float | None = None
    llm: float | None = None
    embeddings: float | None = None  # word embeddings and output head


@dataclass(frozen=True)
class Adapters:
    """LoRA on matrices of the language model's layers; `four_bits` is QLoRA: all of these in NF4.

    `targets` are the names of the matrices, such as "q_proj"; if empty, all of them have adapters.
    """

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    four_bits: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"The adapters' {name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"The adapters' dropout must be at least 0 and below 1, got {self.dropout}.")


# Minimum values of a recipe's integers.
LEAST = {
    **dict.fromkeys(("batch_size", "steps", "max_length", "shuffle_buffer", "largest_device_batch"), 1),
    **dict.fromkeys(("save_steps", "kept_checkpoints", "logging_steps"), 1),
    **dict.fromkeys(("workers", "seed"), 0),
}


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration; `dataclasses.replace` changes fields.

    The learning rates rise over the first `warmup_ratio` of the steps and fall along a cosine. `batch_size` is the
    number of records a step over all devices. `steps` None means `epochs` passes through the data. `text` "plain"
    trains on `<image>{answer}` without a chat template, "words" on the visual words in the answers. Every step draws
    its visual tokens from `token_budgets`, counts or (rows, columns) grids; if empty, the model's default is used.
    `tiles` become the processor's, and are saved with it; None leaves them as they are.
    `truncate` shortens records of more than `max_length` tokens, which are otherwise bad. Streams use `shuffle_buffer`,
    and ignore `group_by_modality`.
    """

    name: str
    source: str
    rates: LearningRates
    batch_size: int
    adapters: Adapters | None = None
    epochs: float = 1
    steps: int | None = None
    text: Literal["chat", "plain", "words"] = "chat"
    max_length: int = 2048
    truncate: bool = False
    group_by_modality: bool = False
    shuffle_buffer: int = 1000
    token_budgets: tuple[int | tuple[int, int], ...] = ()
    tiles: int | tuple[int, int] | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0  # of matrices; biases, norms and scales have none
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    bf16: bool = True
    activation_checkpointing: bool = True
    liger: bool = False
    largest_device_batch: int = 16
    bad_records: Literal["fatal", "skip"] = "fatal"
    save_steps: int = 500
    kept_checkpoints: int = 2
    logging_steps: int = 10
    workers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        rates = vars(self.rates)
        if not any(rates.values()):
            raise ValueError("Every part of the model is frozen: give at least one part a learning rate.")
        for part, rate in rates.items():
            if rate is not None and not 0 < rate < 1:
                raise ValueError(f"The learning rate of the {part} must lie between 0 and 1, got {rate}.")
        if self.adapters and (self.rates.embeddings or not self.rates.llm):
            raise ValueError("Adapters train at the rate of `llm`, and the embeddings stay frozen: set these two so.")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"The recipe's {name} must be at least {least}, got {value}.")
        for name in ("epochs", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"The recipe's {name} must be above 0, got {getattr(self, name)}.")
        for name in ("warmup_ratio", "weight_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"The recipe's {name} must be at least 0 and below 1, got {getattr(self, name)}.")

    @property
    def four_bits(self) -> bool:
        """Whether the language model's matrices are quantised to four bits."""
        return self.adapters is not None and self.adapters.four_bits


def align() -> Recipe:
    """Stage 1: trains the projector on captions, with a frozen language model."""
    return Recipe(
        name="align",
        source="LLaVA-1.5's first stage",
        rates=LearningRates(projector=1e-3),
        batch_size=256,
        text="plain",
    )


def words() -> Recipe:
    """Before stage 1, for a model with visual words: the projector says those of the captions, without the LLM."""
    return Recipe(
        name="words",
        source="this project; visual words after Ovis",
        rates=LearningRates(projector=1e-3),
        batch_size=64,
        text="words",
        weight_decay=0.05,
        adam_beta2=0.98,
        activation_checkpointing=False,
        largest_device_batch=64,
    )


def instruct() -> Recipe:
    """Stage 2: trains projector and language model on conversations; the tower stays frozen."""
    return Recipe(
        name="instruct",
        source="LLaVA-1.5's second stage",
        rates=LearningRates(projector=2e-5, llm=2e-5, embeddings=2e-5),
        batch_size=128,
        group_by_modality=True,
    )


def instruct_lora() -> Recipe:
    """Stage 2 with the whole projector and low-rank adapters in the language model."""
    return replace(
        instruct(),
        name="instruct_lora",
        source="LLaVA-1.5's second stage with LoRA",
        rates=LearningRates(projector=2e-5, llm=2e-4),
        adapters=Adapters(),
    )


def instruct_qlora() -> Recipe:
    """As `instruct_lora`, with the language model in four bits, for one small GPU."""
    return replace(instruct_lora(), name="instruct_qlora", adapters=Adapters(four_bits=True))


def elastic() -> Recipe:
    """Stage 2 with a random token budget in every step, so that one model serves any budget."""
    return replace(
        instruct(),
        name="elastic",
        source="stage 2 with budgets drawn at random, after MQT",
        token_budgets=(1, 4, 9, 16, 36, 64, 100, 144, 196, 256),
    )


def mqt_align() -> Recipe:
    """MQT's stage 1: LLaVA-1.5's, at the full budget of 256 tokens."""
    return replace(align(), name="mqt-align", source="MQT's first stage", token_budgets=(256,))


def mqt_instruct() -> Recipe:
    """MQT's stage 2: an even number of tokens, up to 256, drawn for every step; two epochs."""
    return replace(
        instruct(),
        name="mqt-instruct",
        source="MQT's second stage",
        epochs=2,
        token_budgets=tuple((1, count) for count in range(2, 257, 2)),  # MQT's tokens have no grid
    )


def mobilevlm_v2_align() -> Recipe:
    """MobileVLM V2's stage 1, which also trains the language model."""
    rates = LearningRates(projector=1e-3, llm=2e-5, embeddings=2e-5)
    return replace(align(), name="mobilevlm-v2-align", source="MobileVLM V2's pre-training", rates=rates)


def mobilevlm_v2_instruct() -> Recipe:
    """MobileVLM V2's stage 2."""
    rates = LearningRates(projector=4e-5, llm=4e-5, embeddings=4e-5)
    return replace(instruct(), name="mobilevlm-v2-instruct", source="MobileVLM V2's multi-task training", rates=rates)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "words": words,
    "align": align,
    "instruct": instruct,
    "instruct_lora": instruct_lora,
    "instruct_qlora": instruct_qlora,
    "elastic": elastic,
    "llava-1.5-align": lambda: replace(align(), name="llava-1.5-align"),
    "llava-1.5-instruct": lambda: replace(instruct(), name="llava-1.5-instruct"),
    "tokenpacker-align": lambda: replace(align(), name="tokenpacker-align", source="TokenPacker's first stage"),
    "tokenpacker-instruct": lambda: replace(
        instruct(), name="tokenpacker-instruct", source="TokenPacker's second stage (there with ZeRO-2)"
    ),
    "mqt-align": mqt_align,
    "mqt-instruct": mqt_instruct,
    "mobilevlm-v2-align": mobilevlm_v2_align,
    "mobilevlm-v2-instruct": mobilevlm_v2_instruct,
}


def recipe_named(recipe: str | Recipe) -> Recipe:
    """A recipe by its name in `RECIPES`; a Recipe is returned as it is. Raises ValueError for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}: choose one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]()


def recipe_table() -> str:
    """The recipes, one a line: name, batch size, learning rates and source."""
    rows = [f"{'recipe':24}{'batch':>6}  {'learning rates':46}source"]
    for make in RECIPES.values():
        recipe = make()
        rows.append(f"{recipe.name:24}{recipe.batch_size:>6}  {rates_text(recipe.rates):46}{recipe.source}")
    return "\n".join(
        [
            *rows,
            f"{'tiny':24}{'':>6}  {'':46}the checkpoint in this package, from random weights",
            f"{'small':24}{'':>6}  {'':46}the small model of real parts: see docs/small.md",
        ]
    )


def rates_text(rates: LearningRates) -> str:
    """The learning rates of the trained parts: "projector 0.001, llm 2e-05"."""
    return ", ".join(f"{part} {rate:g}" for part, rate in vars(rates).items() if rate)
