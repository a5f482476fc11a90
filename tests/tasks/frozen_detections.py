"""A frozen set of predictions and truth: four classes, every size, crowds, ties, empty images, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CLASSES = 4
WIDTH, HEIGHT = 320, 240


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Sides from 6 to 200 pixels, evenly on a logarithmic scale."""
    sides = np.exp(rng.uniform(np.log(6), np.log(200), (count, 2)))
    corner = rng.random((count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([corner, corner + sides], 1)


def masks_of(found: np.ndarray) -> torch.Tensor:
    """The lower triangle of each box, (n, height, width)."""
    masks = torch.zeros(len(found), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, found.round().astype(int)):
        mask[y1:y2, x1:x2] = torch.ones(y2 - y1, x2 - x1, dtype=torch.bool).tril()
    return masks


def frozen(images: int = 24) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Targets and predictions of each image: most objects found, more or less well, and false ones."""
    rng = np.random.default_rng(2026)
    targets, predictions = [], []
    for image in range(images):
        count = 0 if image % 8 == 5 else int(rng.integers(1, 7))
        truth, labels = boxes(rng, count), rng.integers(1, CLASSES + 1, count)
        crowd = (rng.random(count) < 0.15).astype(np.int64)
        moved = truth + rng.normal(0, 0.06, (count, 4)) * np.tile(truth[:, 2:] - truth[:, :2], 2)
        kept = rng.random(count) < 0.85
        false = boxes(rng, int(rng.integers(0, 5)))
        found = np.concatenate([moved[kept], false]).clip(0, [WIDTH, HEIGHT] * 2)
        guessed = np.where(rng.random(count) < 0.9, labels, rng.integers(1, CLASSES + 1, count))[kept]
        guessed = np.concatenate([guessed, rng.integers(1, CLASSES + 1, len(false))])
        sides = truth[:, 2:] - truth[:, :2]
        targets.append(
            {
                "boxes": torch.tensor(truth, dtype=torch.float32),
                "labels": torch.tensor(labels),
                "iscrowd": torch.tensor(crowd),
                "area": torch.tensor(0.6 * sides.prod(1), dtype=torch.float32),
                "image_id": torch.tensor(image),
                "masks": masks_of(truth),
            }
        )
        predictions.append(
            {
                "boxes": torch.tensor(found, dtype=torch.float32),
                "labels": torch.tensor(guessed, dtype=torch.int64),
                "scores": torch.tensor(
                    rng.integers(1, 20, len(found)) / 20, dtype=torch.float32
                ),  # with ties
                "masks": masks_of(found)[:, None].float(),
            }
        )
    return targets, predictions
