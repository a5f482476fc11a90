"""What a segmentation model found in test pictures: overlays, tables, and W&B's masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from lora_lightning.data.mask_files import IGNORED
from lora_lightning.data.mask_pictures import BLACK, Colour, overlay
from lora_lightning.report.pictures import WIDTH
from lora_lightning.tasks.confusion import Segmentation, ious

WRONG: Colour = (232, 67, 46)
CONFUSED = 10  # pairs of classes on the page


@dataclass
class Example:
    """A test picture: its place in the part, its true mask, and the map of each state of the model."""

    place: int
    truth: np.ndarray
    found: dict[str, np.ndarray]


def views_of(example: Example, picture: Image.Image, colours: Sequence[Colour]) -> dict[str, Image.Image]:
    """The pictures of one row: the picture, the truth, each state's map, and where the last is wrong."""
    nothing = np.full(example.truth.shape, IGNORED, np.uint8)
    views = {"picture": overlay(picture, nothing, colours, WIDTH)}
    views["truth"] = overlay(picture, example.truth, colours, WIDTH)
    for state, found in example.found.items():
        views[state] = overlay(picture, found, colours, WIDTH)
    wrong = (list(example.found.values())[-1] != example.truth) & (example.truth != IGNORED)
    views["mistakes"] = overlay(
        picture.convert("L").convert("RGB"), wrong.astype(np.uint8), [BLACK, WRONG], WIDTH
    )
    return views


def tables_of(tested: Segmentation, names: Sequence[str]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Header and rows, all numbers fractions, None where there is none: `per_class`, and `confused`, the
    classes that are most often taken for each other."""
    matrix = tested.matrix()
    true, found, right = matrix.sum(1), matrix.sum(0), matrix.diagonal()
    whole = max(1, int(matrix.sum()))
    with np.errstate(invalid="ignore"):  # of a class that is nowhere
        rates = np.stack([ious(matrix), right / true, right / found, true / whole, found / whole], 1)
    rows = [
        [name, *(None if value != value else value for value in row)]
        for name, row in zip(names, rates.tolist(), strict=True)
    ]
    tables = {"per_class": (["class", "iou", "recall", "precision", "of the pixels", "found on"], rows)}
    if pairs := tested.confused(CONFUSED):
        confused = [[names[t], names[f], count / whole] for t, f, count in pairs]
        tables["confused"] = (["true", "predicted", "of the pixels"], confused)
    return tables


def log_to_wandb(
    logger: WandbLogger,
    key: str,
    pictures: Sequence[tuple[Image.Image, Tensor, Tensor]],
    names: Sequence[str],
) -> None:
    """Pictures with true and found masks as W&B's own, to be switched on and off there.

    Args:
        pictures: picture, true mask and map (height, width), of any one size.
    """
    labels = {**dict(enumerate(names)), IGNORED: "ignored"}
    masks = [
        {
            kind: {"mask_data": mask.cpu().numpy().astype(np.uint8), "class_labels": labels}
            for kind, mask in (("ground_truth", truth), ("predictions", found))
        }
        for _, truth, found in pictures
    ]
    logger.log_image(key, [picture for picture, _, _ in pictures], masks=masks)
