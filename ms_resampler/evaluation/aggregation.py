"""Aggregates scored samples to a benchmark's numbers, in a form that a bootstrap can repeat quickly.

Every unit (a picture, or pictures that belong together) has a few counts; a benchmark's numbers are a function of the
sums of the counts, so that resampling units only changes the sums.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .samples import Scored

Counts = Mapping[str, float]
Sums = Mapping[str, np.ndarray]  # of one resample of units, or of several


@dataclass(frozen=True)
class Aggregation:
    """tally: the counts of samples that belong together, by unit; finish: a benchmark's numbers from their sums.

    scale: the largest possible value of the headline number, to compare tasks.
    """

    tally: Callable[[Sequence[Scored]], Iterable[tuple[str, Counts]]]
    finish: Callable[[Sums], dict[str, np.ndarray]]
    headline: str
    scale: float = 100.0


def count_units(aggregation: Aggregation, scored: Sequence[Scored]) -> tuple[list[str], list[str], np.ndarray]:
    """The units in order, the names of their counts, and the counts (units, names)."""
    by_unit: dict[str, dict[str, float]] = {}
    for unit, counts in aggregation.tally(scored):
        row = by_unit.setdefault(unit, defaultdict(float))
        for name, count in counts.items():
            row[name] += count
    units, names = sorted(by_unit), sorted({name for row in by_unit.values() for name in row})
    table = np.array([[by_unit[unit].get(name, 0.0) for name in names] for unit in units])
    return units, names, table.reshape(len(units), len(names))


def finish_sums(aggregation: Aggregation, names: Sequence[str], sums: np.ndarray) -> dict[str, np.ndarray]:
    """A benchmark's numbers from sums (..., names); what has no samples is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return aggregation.finish({name: sums[..., index] for index, name in enumerate(names)})


def mean_of_scores(*breakdowns: str, headline: str = "accuracy", scale: float = 100.0) -> Aggregation:
    """The mean score of all samples, and by the values of `meta` columns; of all columns if none is named.

    A column holds a text or a boolean, or a list of texts, each of which counts.
    """

    def tally(scored: Sequence[Scored]) -> Iterable[tuple[str, Counts]]:
        for item in scored:
            counts = {"n": 1.0, "score": item.outcome.score}
            for column in breakdowns or item.sample.meta:
                values = item.sample.meta.get(column)
                for value in values if isinstance(values, list) else [values]:
                    if isinstance(value, str | bool):
                        label = f"{column}: {value}"
                        counts |= {f"n|{label}": 1.0, f"score|{label}": item.outcome.score}
            yield item.sample.unit, counts

    def finish(sums: Sums) -> dict[str, np.ndarray]:
        labels = [name.partition("|")[2] for name in sums if name.startswith("n|")]
        parts = {label: scale * sums[f"score|{label}"] / sums[f"n|{label}"] for label in labels}
        return {headline: scale * sums["score"] / sums["n"]} | parts

    return Aggregation(tally, finish, headline, scale)


def groups_of(scored: Sequence[Scored]) -> Iterable[list[Scored]]:
    """Samples that are scored together."""
    groups: dict[str, list[Scored]] = {}
    for item in scored:
        groups.setdefault(item.sample.group or item.sample.id, []).append(item)
    return groups.values()
