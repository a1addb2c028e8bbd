"""The data of every step, a function of seed and step only, so that any run can resume.

A run is a list of positions; step k trains on the `batch_size` positions from k * batch_size, for any number of
devices.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..configuration_ms_resampler import token_grid
from .recipes import Recipe
from .records import StreamedRecords

Budget = int | tuple[int, int]
POOL = 50  # batches sorted by length together: more makes lengths more alike, and shuffles less


class Schedule(Dataset):
    """The records of a whole run in training order, epoch after epoch, each with its step's budget."""

    def __init__(self, records: Any, recipe: Recipe):
        if not len(records):
            raise ValueError("The data hold no records.")
        self.records = records
        self.recipe = recipe
        self.steps = recipe.steps or math.ceil(recipe.epochs * len(records) / recipe.batch_size)
        self._order: tuple[int, Sequence[int]] = (-1, ())

    @property
    def epochs(self) -> float | None:
        """The number of epochs, if known."""
        return len(self) / len(self.records)

    def __str__(self) -> str:
        return f"{self.epochs:.2f} times through {len(self.records):,}"

    def notes(self) -> list[str]:
        """Sentences about unexpected behaviour."""
        return []

    def extent(self) -> dict[str, int]:
        """The amount of data, and what else the order depends on, for the run's record."""
        return {"records": len(self.records)}

    def __len__(self) -> int:
        return self.steps * self.recipe.batch_size

    def __getitem__(self, position: int) -> tuple[dict[str, Any], Budget | None]:
        return self.record(position), self.budget(position // self.recipe.batch_size)

    def record(self, position: int) -> dict[str, Any]:
        """The record at a position of the run."""
        epoch, place = divmod(position, len(self.records))
        if self._order[0] != epoch:
            recipe = self.recipe
            begun = epoch * len(self.records) % recipe.batch_size
            order = epoch_order(self.records, recipe.batch_size, recipe.seed, epoch, recipe.group_by_modality, begun)
            self._order = epoch, order
        return self.records[self._order[1][place]]

    def budget(self, step: int) -> Budget | None:
        """The visual tokens per image in this step; None is the model's default."""
        budgets = self.recipe.token_budgets
        if not budgets:
            return None
        return budgets[np.random.default_rng([self.recipe.seed, step]).integers(len(budgets))]


class StreamSchedule(Schedule):
    """A run over a stream, of which every worker of every device reads one part.

    Batches alternate among the parts as the Trainer assigns them to devices and workers, so that each part is read
    from start to end. A resumed run reads its parts again up to its position.
    """

    def __init__(self, records: StreamedRecords, recipe: Recipe, devices: int, device_batch: int):
        if recipe.steps is None:
            raise ValueError("A stream has no length, so epochs are undefined: give the number of steps, --steps.")
        self.records = records
        self.recipe = recipe
        self.steps = recipe.steps
        self.parts = devices * max(1, recipe.workers)
        self.device_batch = device_batch
        self._open: dict[int, tuple[int, Iterator[dict[str, Any]]]] = {}  # records read of a part, and the rest

    epochs = None

    def __str__(self) -> str:
        return f"from a stream in {self.parts} parts, shuffled {self.recipe.shuffle_buffer:,} at a time"

    def notes(self) -> list[str]:
        notes = ["A stream cannot be grouped by modality and length: batches are in the order of the stream."]
        if (shards := self.records.rows.num_shards) % self.parts:
            notes.append(
                f"Each of the {self.parts} parts (devices times workers) reads the whole stream and keeps its share: "
                f"{shards} shards cannot be divided evenly."
            )
        return notes

    def extent(self) -> dict[str, int]:
        return {"parts": self.parts, "device_batch": self.device_batch}

    def record(self, position: int) -> dict[str, Any]:
        """The record at a position of the run; an earlier position restarts its part."""
        batch, place = divmod(position, self.device_batch)
        turn, part = divmod(batch, self.parts)
        number = turn * self.device_batch + place
        read, rest = self._open.get(part, (math.inf, iter(())))
        if read > number:
            read, rest = 0, self.records.part(part, self.parts, self.recipe.seed, self.recipe.shuffle_buffer)
        record = next(itertools.islice(rest, int(number - read), None))
        self._open[part] = number + 1, rest
        return record


def check_budgets(recipe: Recipe, config: Any) -> None:
    """Raises ValueError, with the model's reason, if it cannot produce one of the recipe's budgets."""
    for budget in recipe.token_budgets:
        token_grid(budget, config.native_patch_grid)


def epoch_order(
    records: Any, batch_size: int, seed: int, epoch: int, grouped: bool = False, begun: int = 0
) -> Sequence[int]:
    """The shuffled order of the records in an epoch, a function of seed and epoch only.

    `grouped` forms batches of one modality (with images, or text only) and similar length, except at both ends.
    `begun` is the number of records in the first batch that belong to the epoch before.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(records))
    if not grouped:
        return order.tolist()
    first, order = np.split(order, [-begun % batch_size])
    lengths, groups, rest = records.lengths(), [], []
    for has_image in (True, False):
        alike = order[records.modality[order] == has_image]
        whole = len(alike) // batch_size * batch_size
        rest.append(alike[whole:])
        for pool in np.split(alike[:whole], range(POOL * batch_size, whole, POOL * batch_size)):
            by_length = pool[np.argsort(lengths[pool], kind="stable")]
            groups += list(by_length.reshape(-1, batch_size))
    generator.shuffle(groups)
    return np.concatenate([first, *groups, *rest]).tolist()
