"""What every step of a run trains on: a function of the seed and the step alone, so that any run can go on.

The run is one long list of positions; step k trains on positions k * batch_size and those that follow, however many
devices share them out.
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
POOL = 50  # batches whose records are sorted by length together: more is more alike, and less shuffled


class Schedule(Dataset):
    """The records of a whole run in the order of training, epoch after epoch, each with its step's budget."""

    def __init__(self, records: Any, recipe: Recipe):
        if not len(records):
            raise ValueError("The data hold no records.")
        self.records = records
        self.recipe = recipe
        self.steps = recipe.steps or math.ceil(recipe.epochs * len(records) / recipe.batch_size)
        self._order: tuple[int, Sequence[int]] = (-1, ())

    @property
    def epochs(self) -> float | None:
        """How often the run goes through the records, if that is known."""
        return len(self) / len(self.records)

    def __str__(self) -> str:
        return f"{self.epochs:.2f} times through {len(self.records):,}"

    def notes(self) -> list[str]:
        """Sentences about what may not be expected."""
        return []

    def extent(self) -> dict[str, int]:
        """What a run's record says of how much there is, and of what else the order depends on."""
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
        """The visual tokens an image in this step; None is the model's own budget."""
        budgets = self.recipe.token_budgets
        if not budgets:
            return None
        return budgets[np.random.default_rng([self.recipe.seed, step]).integers(len(budgets))]


class StreamSchedule(Schedule):
    """A run over a stream, which every worker of every device reads a part of.

    Batches of a device take turns among the parts, as the Trainer hands them out to devices and workers, so each part
    is read from start to end. A run that goes on reads its parts again up to its place.
    """

    def __init__(self, records: StreamedRecords, recipe: Recipe, devices: int, device_batch: int):
        if recipe.steps is None:
            raise ValueError("A stream has no length that epochs could count: give the number of steps, --steps.")
        self.records = records
        self.recipe = recipe
        self.steps = recipe.steps
        self.parts = devices * max(1, recipe.workers)
        self.device_batch = device_batch
        self._open: dict[int, tuple[int, Iterator[dict[str, Any]]]] = {}  # of a part: records read, and the rest

    epochs = None

    def __str__(self) -> str:
        return f"from a stream in {self.parts} parts, shuffled {self.recipe.shuffle_buffer:,} at a time"

    def notes(self) -> list[str]:
        notes = ["A stream cannot be grouped by modality and length: batches are as they come."]
        if (shards := self.records.rows.num_shards) % self.parts:
            notes.append(
                f"Each of the {self.parts} parts (devices times workers) reads the whole stream and keeps its share: "
                f"{shards} shards cannot be dealt out evenly."
            )
        return notes

    def extent(self) -> dict[str, int]:
        return {"parts": self.parts, "device_batch": self.device_batch}

    def record(self, position: int) -> dict[str, Any]:
        """The record at a position of the run; going back to an earlier one starts its part again."""
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
    """Raises ValueError, with the model's own reason, if the model cannot make one of the recipe's budgets."""
    for budget in recipe.token_budgets:
        token_grid(budget, config.native_patch_grid)


def epoch_order(
    records: Any, batch_size: int, seed: int, epoch: int, grouped: bool = False, begun: int = 0
) -> Sequence[int]:
    """The order of the records in an epoch: shuffled, a function of seed and epoch alone.

    `grouped` makes every run of `batch_size` records alike in modality (with images, or text only) and length, but for
    the rests at both ends. `begun` is how many records of the first batch the epoch before has filled already.
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
