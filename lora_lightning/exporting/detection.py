"""Detectors as a graph: a picture of one size -> its boxes, labels and scores, as many as there are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn

SUPPRESSION = "torchvision.ops.boxes"  # its batched_nms has a branch for many boxes


class Detector(nn.Module):
    """A detector behind one picture: (1, 3, height, width) in [0, 1] -> a dict of `boxes` (n, 4), `labels`
    and `scores` (n,), and `masks` where it has these, best first.

    Args:
        network: a list of pictures -> a list of such dicts.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, picture: Tensor) -> dict[str, Tensor]:
        (found,) = self.network([picture[0]])
        return {name: found[name] for name in ("boxes", "labels", "scores", "masks") if name in found}


@contextlib.contextmanager
def traced_suppression() -> Iterator[None]:
    """While a graph is traced torchvision suppresses double boxes by a form without branches, of the same
    result: `torch.export` takes no branch on how many boxes there are."""
    boxes = sys.modules.get(SUPPRESSION)
    with mock.patch.object(boxes, "batched_nms", _apart) if boxes else contextlib.nullcontext():
        yield


def _apart(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes (n, 4) that are kept: those of each class are moved to a place of their own, so
    that none overlaps one of another."""
    top = torch.cat([boxes, boxes.new_zeros(1, 4)]).max()  # of no boxes, too
    moved = boxes + (idxs.to(boxes) * (top + 1))[:, None]
    kept: Tensor = sys.modules[SUPPRESSION].nms(moved, scores, iou_threshold)
    return kept
