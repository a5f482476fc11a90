"""Bootstrap intervals: how much a score would differ on other pictures of the same kind.

A resample is a vector of counts, how often each picture was drawn. A statistic takes a block of them,
(resamples, count), and gives a row of values for each, (resamples, values): sums over pictures are products.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Statistic = Callable[[Array], Array]  # counts (resamples, count) -> values (resamples, values)

RESAMPLES = 1000
COVERED = 0.95
BLOCK = 4_000_000  # counts at once: 16 MB


def resampled(statistic: Statistic, count: int, resamples: int = RESAMPLES, seed: int = 0) -> Array:
    """A statistic of so many resamples with replacement, (resamples, values)."""
    generator = np.random.default_rng(seed)
    block = max(1, min(resamples, BLOCK // max(1, count)))
    return np.concatenate(
        [
            statistic(_counts(generator, min(block, resamples - first), count))
            for first in range(0, resamples, block)
        ]
    )


def intervals(
    statistic: Statistic, count: int, resamples: int = RESAMPLES, seed: int = 0, basic: bool = False
) -> Array:
    """Intervals that cover each value of a statistic with a probability of 95 %: between percentiles of the
    resamples (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 13.3).

    Args:
        statistic: of the counts; NaN where a resample has none, which is left out.
        count: how many pictures there are.
        seed: of the draws: the same draws for every statistic of as many pictures.
        basic: mirrored at the value itself, not below 0, and up to the value at least (Davison and Hinkley
            1997, "Bootstrap Methods and their Application", 5.2.1): of what sampling makes greater, once in
            the value and twice in the resamples, such as a mean of absolute values.

    Returns:
        (values, 2): the lower and the upper bound; NaN for a value that no resample has.
    """
    values = resampled(statistic, count, resamples, seed)
    found = np.full((values.shape[1], 2), np.nan)
    some = ~np.isnan(values).all(0)
    tail = (1 - COVERED) / 2
    if some.any():
        found[some] = np.nanquantile(values[:, some], (tail, 1 - tail), axis=0).T
    if basic:
        once = statistic(np.ones((1, count), dtype=np.float32))[0]
        mirrored = 2 * once[:, None] - found[:, ::-1]
        found = np.stack([mirrored[:, 0].clip(0, None), np.maximum(mirrored[:, 1], once)], axis=1)
    return found


def group_sums(counts: Array, groups: Array, number: int, values: Array | None = None) -> Array:
    """Sums over the pictures of each group, (resamples, number).

    Args:
        counts: (resamples, count).
        groups: (count,), the group of each picture, from 0 to number - 1.
        values: (count,), what is summed; None counts the pictures.
    """
    weighted = counts if values is None else counts * values
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    sums = np.zeros((len(counts), number), dtype=np.float64)
    if len(present):
        sums[:, present] = np.add.reduceat(weighted[:, order], starts, axis=1, dtype=np.float64)
    return sums


def _counts(generator: np.random.Generator, resamples: int, count: int) -> Array:
    draws = generator.integers(count, size=(resamples, count))
    draws += np.arange(resamples)[:, None] * count
    flat = np.bincount(draws.ravel(), minlength=resamples * count)
    return flat.reshape(resamples, count).astype(np.float32)
