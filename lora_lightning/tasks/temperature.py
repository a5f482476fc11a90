"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599): one number that makes probabilities honest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LEAST, MOST = 0.05, 20.0
STEPS = 50


def fitted_temperature(logits: Tensor, targets: Tensor) -> float:
    """The T > 0 that makes the cross entropy of logits / T least, from 0.05 to 20.

    In 1 / T the cross entropy is convex, so that its slope has one zero: Newton's steps, kept between bounds
    which halve where a step would leave them. It is computed in float64.

    Args:
        logits: (count, classes).
        targets: (count,) class indices; or (count, classes) in [0, 1], where several classes may hold at once
            (binary cross entropy).

    Returns:
        1.0 where there is nothing to fit: no rows, logits that are not finite, or so few mistakes that the
        least T is the best: then the rows do not tell how sure to be of others.
    """
    logits = logits.double()
    if not len(logits) or not bool(logits.isfinite().all()):
        return 1.0
    low, high, sharpness = 1 / MOST, 1 / LEAST, 1.0
    if _slope(logits, targets, high)[0] <= 0:
        return 1.0
    for _ in range(STEPS):
        slope, curvature = _slope(logits, targets, sharpness)
        low, high = (sharpness, high) if slope < 0 else (low, sharpness)
        step = sharpness - slope / curvature if curvature > 0 else float("nan")
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - sharpness) < 1e-10 * sharpness:
            break
        sharpness = following
    return 1 / sharpness


def _slope(logits: Tensor, targets: Tensor, sharpness: float) -> tuple[float, float]:
    """Of the mean cross entropy in 1 / T: its first and its second derivative."""
    scaled = sharpness * logits
    if targets.ndim == 1:
        probabilities = scaled.softmax(1)
        mean = (probabilities * logits).sum(1)
        slope = mean - logits.gather(1, targets[:, None])[:, 0]
        curvature = (probabilities * logits.square()).sum(1) - mean.square()
    else:
        probabilities = scaled.sigmoid()
        slope = (probabilities - targets.double()) * logits
        curvature = probabilities * (1 - probabilities) * logits.square()
    return float(slope.mean()), float(curvature.mean())


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> float:
    """The mean cross entropy that `fitted_temperature` makes least."""
    scaled = logits.double() / temperature
    if targets.ndim == 1:
        return float(F.cross_entropy(scaled, targets))
    return float(F.binary_cross_entropy_with_logits(scaled, targets.double()))
