"""A model made into what a recipe trains."""

from typing import Any

from transformers import set_seed

from .adapters import add_adapters
from .liger import fuse_loss
from .parameters import freeze
from .recipes import Recipe


def prepare(model: Any, recipe: Recipe) -> Any:
    """The model with frozen parts, fused loss and adapters as the recipe has them, in the precision that it came in."""
    freeze(model, recipe.rates)
    if recipe.liger:
        fuse_loss(model)
    if recipe.adapters is None:
        return model
    set_seed(recipe.seed)  # adapters start at random
    return add_adapters(model, recipe.adapters, recipe.rates)
