"""What is done about classes of unequal sizes: weights, a sampler, or an adjustment of the logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

Imbalance = Literal["class_weights", "balanced_sampler", "logit_adjustment"]


def class_counts(targets: Tensor, num_classes: int) -> Tensor:
    """How many pictures each class has: (classes,), float64.

    Args:
        targets: (n,), class indices, or (n, classes) of 0 and 1.
    """
    if targets.ndim == 2:
        return targets.double().sum(0)
    return torch.bincount(targets, minlength=num_classes).double()


def class_weights(targets: Tensor, num_classes: int) -> list[float]:
    """A weight of the loss a class, so that all classes together weigh alike.

    Of one class a picture n / (classes · n_c), as scikit-learn's "balanced" (King and Zeng 2001); of several
    the weight of a positive, (n - n_c) / n_c, where n - n_c is half a picture at least. A class without
    pictures has 1.
    """
    counts = class_counts(targets, num_classes)
    n = len(targets)
    weights = (n - counts).clamp(min=0.5) / counts if targets.ndim == 2 else n / (num_classes * counts)
    return torch.where(counts > 0, weights, 1.0).tolist()


def logit_adjustment(targets: Tensor, num_classes: int) -> list[float]:
    """What is added to the logits in training, a number a class (Menon et al. 2021, arXiv 2007.07314, with
    tau = 1).

    Of one class a picture the logarithm of the class's share, of several the logit of it. A class without
    pictures is taken to have half a one.
    """
    counts = class_counts(targets, num_classes).clamp(min=0.5)
    if targets.ndim == 2:
        shares = (counts / len(targets)).clamp(max=1 - 0.5 / len(targets))
        return torch.logit(shares).tolist()
    return (counts / counts.sum()).log().tolist()


def balanced_sampler(targets: Tensor, num_classes: int) -> WeightedRandomSampler:
    """As many draws as there are pictures, each class as often as any other; from torch's global generator.

    A picture of several classes counts by its rarest; one of none as the pictures of none together.
    """
    rarity = 1 / class_counts(targets, num_classes).clamp(min=1)
    if targets.ndim == 1:
        each = rarity[targets]
    else:
        none = targets.sum(1) == 0
        each = (targets * rarity).amax(1).where(~none, 1 / none.sum().clamp(min=1))
    return WeightedRandomSampler(each.tolist(), len(targets), replacement=True)
