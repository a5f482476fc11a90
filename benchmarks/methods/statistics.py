"""Means with intervals, and what of a difference exceeds the noise: Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the bounds that cover it with a probability of 95 %; no bounds of a single value."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of normal values: mean ± t · s / √n with n - 1 degrees of freedom."""
    middle = mean(values)
    if len(values) < 2:
        return Interval(middle, -math.inf, math.inf)
    half = quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half)


def difference(own: dict[int, float], other: dict[int, float]) -> Interval | None:
    """Of a method from another, paired by the seeds that both have; None where there are none."""
    shared = sorted(own.keys() & other.keys())
    return interval([own[seed] - other[seed] for seed in shared]) if shared else None


def exceeds_noise(found: Interval | None) -> bool | None:
    """Whether a difference's interval leaves out 0; None where one seed says nothing."""
    if found is None or math.isinf(found.low):
        return None
    return not found.low <= 0 <= found.high


@lru_cache
def quantile(freedom: int) -> float:
    """Of Student's t: what |t| exceeds with a probability of 5 %.

    By the integral of its density, x = √ν · tan θ: P(|t| < x) = 2 c ∫ cos^(ν - 1) θ dθ from 0 to θ.
    """
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(LEVEL, area / area[-1], angles))
    return math.sqrt(freedom) * math.tan(angle)
