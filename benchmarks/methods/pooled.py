"""Differences over all amounts of a few-shot curve, where those of one amount are within their noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.methods.statistics import Interval, interval

Scores = Mapping[str, Mapping[int, float]]  # of each method, by seed


def pooled(amounts: Sequence[Scores], method: str, other: str) -> tuple[Interval, Interval, int] | None:
    """Of a method from another: over all pairs of a seed; over the amounts, each as the mean of its pairs;
    the number of pairs. None where fewer than two amounts have a pair.

    The seeds of an amount share one choice of the rate: pairs taken as independent don't know it, amounts do.
    """
    pairs = [
        [scores[method][seed] - scores[other][seed] for seed in scores[method].keys() & scores[other].keys()]
        for scores in amounts
        if method in scores and other in scores
    ]
    pairs = [of for of in pairs if of]
    if len(pairs) < 2:
        return None
    every = [pair for of in pairs for pair in of]
    return interval(every), interval([mean(of) for of in pairs]), len(every)
