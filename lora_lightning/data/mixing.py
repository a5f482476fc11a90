"""Mixup and cutmix of a batch on its device, for targets and weights of every kind."""

from __future__ import annotations

import torch
from torch import Tensor

Mixed = tuple[Tensor, Tensor, Tensor | None]


def mixed(images: Tensor, targets: Tensor, weights: Tensor | None, mixup: float, cutmix: float) -> Mixed:
    """Each picture mixed with its neighbour in the batch, by mixup (Zhang et al. 2017, arXiv 1710.09412) or
    cutmix (Yun et al. 2019, arXiv 1905.04899), of which one is drawn where both are on.

    The share is drawn once a batch, from Beta(alpha, alpha); random numbers come from torch's global
    generator. Pictures of weights w1 and w2 make one whose loss is the mixed sum of w·loss, for every loss
    that is linear in its target: cross entropy, also the binary one.

    Args:
        images: (batch, 3, height, width), float.
        targets: (batch, …), float: probabilities, or numbers.
        weights: (batch,), or None.
        mixup, cutmix: their alphas, of which one at least is not 0.
    """
    cut = cutmix > 0 and (mixup <= 0 or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(float(cutmix if cut else mixup))
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    others = images.roll(1, 0)
    if cut:
        top, bottom, left, right = _box(images.shape[-2], images.shape[-1], share)
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    else:
        images = images.lerp(others, 1 - share)
    if weights is None:
        return images, targets.lerp(targets.roll(1, 0), 1 - share), None
    own, other = share * weights, (1 - share) * weights.roll(1, 0)
    total = own + other
    part = (other / total.clamp(min=torch.finfo(total.dtype).tiny)).view(-1, *[1] * (targets.ndim - 1))
    return images, targets + part * (targets.roll(1, 0) - targets), total


def _box(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a rectangle whose area is 1 - share where it lies inside the picture."""
    centre_y, centre_x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half = 0.5 * (1 - share) ** 0.5
    half_y, half_x = int(half * height), int(half * width)
    return (
        max(centre_y - half_y, 0),
        min(centre_y + half_y, height),
        max(centre_x - half_x, 0),
        min(centre_x + half_x, width),
    )
