r"""Stands in for the data side until it is merged: a LLaVA JSON, shuffled."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .data import ConversationCollator
from .recipes import Recipe

PLAIN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ part['text'] }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
)


class Records(Dataset):
    """The records of a LLaVA JSON file, images as paths."""

    def __init__(self, source: Path, images: Path | None):
        self.rows = json.loads(source.read_text())
        self.images = images

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else names
        return row | {"image": [str((self.images or Path()) / name) for name in names] or None}


def open_records(source: str, images: Path | None = None) -> Records:
    """The records of a file."""
    return Records(Path(source), images)


def epoch_order(records: Any, batch_size: int, seed: int, epoch: int, grouped: bool) -> Sequence[int]:
    """The order of the records in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(len(records)).tolist()


def make_collator(recipe: Recipe, processor: Any) -> ConversationCollator:
    """The collator of a recipe."""
    if recipe.text == "plain":
        processor = copy.copy(processor)
        processor.chat_template = PLAIN
    return ConversationCollator(processor, recipe.max_length)
