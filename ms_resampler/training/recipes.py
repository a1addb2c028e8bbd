"""Recipes: functions that return complete training runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from .curriculum import PlacesCollator, SceneConversations, ScenePlaces
from .data import ConversationCollator


@dataclass(frozen=True)
class Stage:
    """A training run, complete; `dataclasses.replace` makes another.

    `dataset(records)` gives that many training records, `collator(processor)` makes batches of them. The learning
    rate rises over `warmup_steps`, stays, and falls to zero over the last `cooldown_steps`.
    """

    name: str
    dataset: Callable[[int], Dataset]
    collator: Callable[[Any], Callable]
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    cooldown_steps: int
    weight_decay: float = 0.02
    save_steps: int = 100
    workers: int = 1
    seed: int = 0


def tiny_look(steps: int = 700) -> Stage:
    """Tower and projector learn to see what is at each place, from random weights."""
    return Stage(
        name="look",
        dataset=ScenePlaces,
        collator=PlacesCollator,
        steps=steps,
        batch_size=64,
        learning_rate=2e-3,
        warmup_steps=min(50, steps),
        cooldown_steps=steps // 2,
    )


def tiny_read(steps: int = 2400) -> Stage:
    """The whole model learns to transcribe and index scenes, then to answer questions about them."""
    drills = min(600, steps // 3) * 32
    return Stage(
        name="read",
        dataset=lambda records: SceneConversations(records, drills, turns=10),
        collator=lambda processor: ConversationCollator(processor, max_length=1024),
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=min(100, steps),
        cooldown_steps=int(0.4 * steps),
    )


def tiny_blind(steps: int = 600) -> Stage:
    """The same language model without images, which shows what can be had by guessing."""
    return Stage(
        name="blind",
        dataset=lambda records: SceneConversations(records, drills=0, turns=10, blind=True),
        collator=lambda processor: ConversationCollator(processor, max_length=1024),
        steps=steps,
        batch_size=32,
        learning_rate=1e-3,
        warmup_steps=min(50, steps),
        cooldown_steps=steps // 2,
    )
