"""The losses of a classifier: of one class, of several at once, of a number, by the pictures' weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["class", "classes", "number"]


@dataclass(frozen=True)
class Loss:
    """What is trained to be small.

    Args:
        target: "class", cross entropy; "classes", binary cross entropy, the mean over classes; "number", the
            squared error of a standardized number.
        label_smoothing: the share of each training label spread over all classes.
        class_weights: (classes,), the weight of a picture of each class; of several classes at once, the
            weight of those that a picture has.
        logit_adjustment: (classes,), added to the logits: τ·ln of each class's share of the training pictures
            (Menon et al. 2020, arXiv 2007.07314, equation 10).
        number_mean, number_std: of the training part, by which numbers are standardized.
    """

    target: Target = "class"
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    logit_adjustment: Tensor | None = None
    number_mean: float = 0.0
    number_std: float = 1.0

    def train(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean over a training batch, each picture by its weight.

        Args:
            logits: (batch, classes).
            targets: (batch,) class indices or numbers; (batch, classes) probabilities or, of several classes
                at once, truths from 0 to 1.
            weights: (batch,), not below 0.
        """
        if self.logit_adjustment is not None:
            logits = logits + self.logit_adjustment.to(logits)
        if self.target == "class" and weights is None and self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        rows, share = self._rows(logits, targets)
        if weights is not None:
            rows, share = rows * weights, share * weights
        # As torch does with class weights: what is not weighted has the same loss as with weights of 1.
        return rows.sum() / share.sum().clamp(min=torch.finfo(share.dtype).tiny)

    def plain(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over a batch that is only looked at: unweighted, not smoothed, not adjusted."""
        return Loss(self.target, number_mean=self.number_mean, number_std=self.number_std).train(
            logits, targets
        )

    def _rows(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each picture, and what it counts in the mean, both (batch,)."""
        if self.target == "number":
            wanted = (targets.reshape(len(logits), 1).to(logits.dtype) - self.number_mean) / self.number_std
            rows = F.mse_loss(logits, wanted, reduction="none").mean(1)
            return rows, torch.ones_like(rows)
        classes = None if self.class_weights is None else self.class_weights.to(logits)
        if self.target == "classes":
            smooth = self.label_smoothing
            wanted = targets.to(logits.dtype) * (1 - smooth) + smooth / 2
            rows = F.binary_cross_entropy_with_logits(
                logits, wanted, pos_weight=classes, reduction="none"
            ).mean(1)
            return rows, torch.ones_like(rows)
        rows = F.cross_entropy(
            logits, targets, classes, label_smoothing=self.label_smoothing, reduction="none"
        )
        if classes is None:
            return rows, torch.ones_like(rows)
        return rows, classes[targets] if targets.ndim == 1 else targets.to(logits) @ classes
