"""From a segmentation model's output to classes and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.data.mask_files import IGNORED

Outputs = Tensor | Mapping[str, Tensor]
AT_ONCE = 2**26  # numbers of enlarged logits: 256 MB


def logits_of(outputs: Outputs) -> Tensor:
    """(batch, classes, height, width), of a model that gives them alone or, as torchvision's, as `out`."""
    return outputs if isinstance(outputs, Tensor) else outputs["out"]


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy, the mean over all pixels of the batch that have a class; 0 where none has.

    Args:
        logits: (batch, classes, height, width).
        truth: (batch, height, width), int64; 255 is no class.
    """
    total = F.cross_entropy(logits.float(), truth, ignore_index=IGNORED, reduction="sum")
    return total / (truth != IGNORED).sum().clamp(min=1)


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - the mean Dice coefficient of the classes (Milletari et al. 2016, arXiv 1606.04797) in the batch,
    smoothed by one pixel. Arguments as of `pixel_loss`."""
    known = (truth != IGNORED)[:, None]
    probabilities = logits.float().softmax(1) * known
    wanted = F.one_hot(truth.where(truth != IGNORED, 0), logits.shape[1]).movedim(-1, 1) * known
    # (batch, classes, height, width) -> (classes,)
    both, sizes = ((x).sum((0, 2, 3)) for x in (probabilities * wanted, probabilities + wanted))
    present = wanted.sum((0, 2, 3)) > 0
    return (1 - (2 * both + 1) / (sizes + 1))[present].sum() / present.sum().clamp(min=1)


def class_maps(
    model: nn.Module, pictures: Sequence[Tensor], sizes: Sequence[Sequence[int]], flips: bool = False
) -> list[Tensor]:
    """The class of every pixel at the pictures' full sizes: logits are enlarged before the greatest is taken.

    Pictures of one size go through the model together, and no picture is padded, so that what is found in one
    does not depend on the others.

    Args:
        pictures: (3, height, width) each, as the model takes them.
        sizes: height and width of each map.
        flips: average the logits with those of the mirrored picture.

    Returns:
        (height, width) each, uint8.
    """
    maps: dict[int, Tensor] = {}
    alike: dict[torch.Size, list[int]] = {}
    for number, picture in enumerate(pictures):
        alike.setdefault(picture.shape, []).append(number)
    for numbers in alike.values():
        batch = torch.stack([pictures[n] for n in numbers])
        logits = logits_of(model(batch)).float()
        if flips:
            logits = (logits + logits_of(model(batch.flip(-1))).float().flip(-1)) / 2
        for number, one in zip(numbers, logits, strict=True):
            maps[number] = _greatest(one, sizes[number])
    return [maps[number] for number in range(len(pictures))]


def _greatest(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(classes, height, width) -> (height, width) of another size, uint8: as many classes at once as memory
    has room for."""
    height, width = size
    step = max(1, AT_ONCE // (height * width))
    best = torch.full((height, width), -torch.inf, device=logits.device)
    classes = torch.zeros(height, width, dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), step):
        part = logits[None, first : first + step]
        values, places = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0].max(0)
        better = values > best
        best = torch.where(better, values, best)
        classes = torch.where(better, (places + first).to(torch.uint8), classes)
    return classes
