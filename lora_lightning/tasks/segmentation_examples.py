"""What trackers are shown of a segmentation model: test pictures with masks, the truth, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_lightning.data.mask_files import IGNORED
from lora_lightning.data.mask_pictures import Colour
from lora_lightning.tasks.examples import all_framed
from lora_lightning.tasks.segmentation_pictures import Example as Seen
from lora_lightning.tasks.segmentation_pictures import views_of
from lora_lightning.trainer.trackers.tracker import Example


def examples_of(first: Sequence[Seen], data: Any, colours: Sequence[Colour]) -> list[Example]:
    """The first test pictures.

    Args:
        first: as they were seen.
        data: shows its pictures by `show`.
        colours: of the classes.
    """
    examples = []
    for one in first:
        name, picture = data.show("test", one.place)
        words = {state: f"{_right(found, one.truth):.0%} right" for state, found in one.found.items()}
        examples.append(Example(str(name), words, all_framed(views_of(one, picture, colours))))
    return examples


def _right(found: np.ndarray, truth: np.ndarray) -> float:
    """The share of the pixels that have a class."""
    known = truth != IGNORED
    return float((found[known] == truth[known]).mean()) if known.any() else 0.0
