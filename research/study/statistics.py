"""Statistics of scores: means by group of questions, intervals over pictures and seeds, paired differences.

Dimensions, as name suffixes: S seeds, B pictures, F families of questions (and the dense probe, last), G groups (and
the overall mean, last), R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .data import STUDY_FAMILIES

ROWS = {**STUDY_FAMILIES, "dense": "dense"}  # families and their groups
GROUPS = list(dict.fromkeys(ROWS.values()))
RESAMPLES = 2_000


def score_matrix(scores: dict[str, str]) -> np.ndarray:
    """A run's scores (F, B) in [0, 1]; NaN where a family has no question about a picture."""
    letters = [[{"1": 1.0, "0": 0.0, "-": np.nan}[letter] for letter in scores[family]] for family in STUDY_FAMILIES]
    return np.array([*letters, np.frombuffer(bytes.fromhex(scores["dense"]), np.uint8) / 100])


def group_means(family_F: np.ndarray) -> np.ndarray:
    """Means (..., G) of the groups of families and of the groups, from means (..., F) of families."""
    groups = [family_F[..., [row == group for row in ROWS.values()]].mean(axis=-1) for group in GROUPS]
    return np.stack([*groups, np.mean(groups, axis=0)], axis=-1)


def overall(scores: dict[str, str]) -> float:
    """The mean over groups, in [0, 1], of one run."""
    return float(group_means(np.nanmean(score_matrix(scores), axis=1))[-1])


def resampled_means(scores_SFB: np.ndarray, seed: int = 0) -> np.ndarray:
    """Group means (R, G) over resampled seeds and resampled pictures, drawn anew and independently each time."""
    rng = np.random.default_rng(seed)
    seeds, families, pictures = scores_SFB.shape
    weight_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    weight_RB = rng.multinomial(pictures, np.full(pictures, 1 / pictures), RESAMPLES)
    asked_FB = ~np.isnan(scores_SFB[0])
    over_seeds_RFB = (weight_RS @ np.nan_to_num(scores_SFB).reshape(seeds, -1)).reshape(-1, families, pictures)
    total_RF = np.einsum("rfb,rb->rf", over_seeds_RFB, weight_RB)
    return group_means(total_RF / (seeds * weight_RB @ asked_FB.T))


@dataclass(frozen=True)
class Estimate:
    """Means of the groups, overall last, and their 95% intervals, all (G,)."""

    mean_G: np.ndarray
    low_G: np.ndarray
    high_G: np.ndarray


def estimate(scores_SFB: np.ndarray) -> Estimate:
    """Percentile bootstrap over pictures and seeds."""
    mean_G = group_means(np.nanmean(scores_SFB, axis=(0, 2)))
    low_G, high_G = np.percentile(resampled_means(scores_SFB), [2.5, 97.5], axis=0)
    return Estimate(mean_G, low_G, high_G)


@dataclass(frozen=True)
class Difference:
    """Our score minus another's, same seeds and pictures: estimates, and overall the t-test over seeds.

    `p` is NaN if the seeds do not differ. `validation` is the overall difference on validation pictures and its 95%
    t-interval over seeds.
    """

    estimate: Estimate
    p: float
    seeds: int
    validation: tuple[float, float, float]


def difference(ours_SFB: np.ndarray, other_SFB: np.ndarray, validation_S: np.ndarray) -> Difference:
    """Paired comparison of two arms, whose overall difference on validation pictures is known."""
    difference_SFB = ours_SFB - other_SFB
    by_seed_S = group_means(np.nanmean(difference_SFB, axis=2))[:, -1]
    seeds, found, validation = len(by_seed_S), estimate(difference_SFB), mean_over_seeds(validation_S)
    if np.ptp(by_seed_S) == 0:
        return Difference(found, np.nan, seeds, validation)
    return Difference(found, float(stats.ttest_1samp(by_seed_S, 0).pvalue), seeds, validation)


def mean_over_seeds(value_S: np.ndarray) -> tuple[float, float, float]:
    """The mean and its 95% t-interval (NaN for a single seed)."""
    mean, seeds = float(value_S.mean()), len(value_S)
    if seeds == 1:
        return mean, np.nan, np.nan
    margin = float(stats.t.ppf(0.975, seeds - 1) * value_S.std(ddof=1) / np.sqrt(seeds))
    return mean, mean - margin, mean + margin


def corrected(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted by Benjamini and Hochberg's method; NaN is kept."""
    p = np.array(p_values, float)
    known = ~np.isnan(p)
    if known.any():
        p[known] = stats.false_discovery_control(p[known])
    return p
