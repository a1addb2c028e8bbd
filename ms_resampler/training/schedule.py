"""What every step of a run trains on: a function of the seed and the step alone, so that any run can go on.

The run is one long list of positions; step k trains on positions k * batch_size and those that follow, however many
devices share them out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..configuration_ms_resampler import token_grid
from .data import epoch_order
from .recipes import Recipe

Budget = int | tuple[int, int]


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
    def epochs(self) -> float:
        """How often the run goes through the records."""
        return len(self) / len(self.records)

    def __len__(self) -> int:
        return self.steps * self.recipe.batch_size

    def __getitem__(self, position: int) -> tuple[dict[str, Any], Budget | None]:
        epoch, place = divmod(position, len(self.records))
        if self._order[0] != epoch:
            recipe = self.recipe
            begun = epoch * len(self.records) % recipe.batch_size
            order = epoch_order(self.records, recipe.batch_size, recipe.seed, epoch, recipe.group_by_modality, begun)
            self._order = epoch, order
        return self.records[self._order[1][place]], self.budget(position // self.recipe.batch_size)

    def budget(self, step: int) -> Budget | None:
        """The visual tokens an image in this step; None is the model's own budget."""
        budgets = self.recipe.token_budgets
        if not budgets:
            return None
        return budgets[np.random.default_rng([self.recipe.seed, step]).integers(len(budgets))]


def check_budgets(recipe: Recipe, config: Any) -> None:
    """Raises ValueError, with the model's own reason, if the model cannot make one of the recipe's budgets."""
    for budget in recipe.token_budgets:
        token_grid(budget, config.native_patch_grid)
