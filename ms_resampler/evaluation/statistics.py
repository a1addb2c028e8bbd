"""Intervals and tests: a bootstrap over pictures, paired between models, and Holm's correction over tasks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .aggregation import Aggregation, count_units, finish_sums
from .samples import Scored

RESAMPLES = 2000
BLOCK = 100  # resamples at a time, to limit memory


@dataclass(frozen=True)
class Difference:
    """The difference of two models in a task's headline number, second minus first, with a 95% interval and a p-value.

    samples: the number that both models answered; only these are compared.
    """

    value: float
    low: float
    high: float
    p: float
    samples: int


def value_of(aggregation: Aggregation, scored: Sequence[Scored]) -> dict[str, float]:
    """A task's numbers."""
    _, names, counts = count_units(aggregation, scored)
    return {name: float(number) for name, number in finish_sums(aggregation, names, counts.sum(axis=0)).items()}


def headline(aggregation: Aggregation, names: Sequence[str], sums: np.ndarray) -> np.ndarray:
    """The number that tables show."""
    return finish_sums(aggregation, names, sums)[aggregation.headline]


def draws(units: int, seed: int) -> Iterator[np.ndarray]:
    """How many times each unit is drawn in each resample, in blocks (resamples, units)."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES // BLOCK):
        yield rng.multinomial(units, np.full(units, 1 / units), size=BLOCK)


def interval(aggregation: Aggregation, scored: Sequence[Scored], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the headline number, over resampled pictures.

    Resamples that leave a split or category of the task without a picture have no number, and are left out.
    """
    units, names, counts = count_units(aggregation, scored)
    values = np.concatenate([headline(aggregation, names, block @ counts) for block in draws(len(units), seed)])
    if np.isnan(values).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def compare(aggregation: Aggregation, first: Sequence[Scored], second: Sequence[Scored], seed: int = 0) -> Difference:
    """The second model minus the first, on the samples that both answered.

    The interval is a bootstrap over pictures, the same draws for both models. The p-value is that of a two-sided
    randomisation test: the models' answers about a picture are exchanged at random, and differences at least as large
    are counted. Raises ValueError if there is no sample that both answered.
    """
    shared = {item.sample.id for item in first} & {item.sample.id for item in second}
    if not shared:
        raise ValueError("The two runs have no sample in common.")
    pair = [[item for item in side if item.sample.id in shared] for side in (first, second)]
    tables = [count_units(aggregation, side) for side in pair]
    names = sorted(set(tables[0][1]) | set(tables[1][1]))
    assert tables[0][0] == tables[1][0], "the same samples have the same pictures"
    a, b = (widened(table, names) for table in tables)

    def difference(sums_a: np.ndarray, sums_b: np.ndarray) -> np.ndarray:
        return headline(aggregation, names, sums_b) - headline(aggregation, names, sums_a)

    observed = float(difference(a.sum(axis=0), b.sum(axis=0)))
    if np.isnan(observed):  # the shared samples have no headline number, such as an F1 without a positive
        return Difference(np.nan, np.nan, np.nan, 1.0, len(shared))
    values = np.concatenate([difference(block @ a, block @ b) for block in draws(len(a), seed)])
    rng = np.random.default_rng(seed + 1)
    extreme = 0
    for _ in range(RESAMPLES // BLOCK):
        swapped = rng.integers(2, size=(BLOCK, len(a)))
        moved = swapped @ (b - a)
        extreme += int((np.abs(difference(a.sum(axis=0) + moved, b.sum(axis=0) - moved)) >= abs(observed) - 1e-9).sum())
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Difference(observed, float(low), float(high), (extreme + 1) / (RESAMPLES + 1), len(shared))


def widened(table: tuple[list[str], list[str], np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Counts with zero columns for missing names."""
    _, own, counts = table
    places = {name: place for place, name in enumerate(own)}
    columns = [counts[:, places[name]] if name in places else np.zeros(len(counts)) for name in names]
    return np.stack(columns, axis=1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's method, which controls the family-wise error rate."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
