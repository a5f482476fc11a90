"""What a detector found in test images: which of it is right, in pictures, and as W&B's boxes and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lora_lightning.report.labels import placed
from lora_lightning.report.pictures import WIDTH
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.ops import box_iou
    from torchvision.transforms.functional import to_pil_image

TRUTH, RIGHT, WRONG, MISSED = "#3d8bfd", "#2fbf4f", "#e8432e", "#f2c316"
LETTERS = 15  # size of a label's letters in a picture
MISSES = -math.inf  # the score of what found an object that nothing found
Picture = Mapping[str, Any]  # boxes, labels and what belongs to them, of one image
Box = tuple[Sequence[float], str, str]  # x1 y1 x2 y2, colour, caption


@dataclass
class Verdict:
    """Which predictions are right, and by which score each object was found: -inf where nothing found it, inf
    of a crowd, which is never missed."""

    right: list[bool]
    scores: list[float]

    @property
    def found(self) -> list[bool]:
        """Which objects were found."""
        return [score > MISSES for score in self.scores]

    @property
    def mistakes(self) -> int:
        """False positives and misses."""
        return self.right.count(False) + self.found.count(False)


@dataclass
class Example:
    """A test image, and what was found in it by each state of the model."""

    image: Tensor
    truth: Picture
    found: dict[str, Picture]

    def confident(self, threshold: float) -> Example:
        """Without the predictions whose score is below the threshold."""
        found: dict[str, Picture] = {s: confident(one, threshold) for s, one in self.found.items()}
        return Example(self.image, self.truth, found)


def judge(prediction: Picture, truth: Picture, iou: float = 0.5) -> Verdict:
    """The surest first, each prediction takes the free object of its class that it overlaps most. What is
    said of one does not depend on less sure ones.

    Args:
        prediction: boxes, scores and labels.
        truth: boxes and labels; objects with `iscrowd` are never missed.
        iou: the least overlap, intersection over union.
    """
    crowd = truth.get("iscrowd", torch.zeros(len(truth["labels"]))).bool().cpu()
    overlap = box_iou(prediction["boxes"].cpu(), truth["boxes"].cpu())  # (predictions, objects)
    overlap = overlap * (prediction["labels"].cpu()[:, None] == truth["labels"].cpu()[None])
    verdict = Verdict([False] * len(overlap), [math.inf if one else MISSES for one in crowd.tolist()])
    for i in prediction["scores"].argsort(descending=True, stable=True).tolist():
        free = overlap[i].masked_fill(torch.tensor(verdict.found, dtype=torch.bool), 0)
        if len(free) and free.max() >= iou:
            verdict.scores[int(free.argmax())] = float(prediction["scores"][i])
            verdict.right[i] = True
        elif crowd.any() and overlap[i][crowd].max() >= iou:
            verdict.right[i] = True
    return verdict


def confident(prediction: Picture, threshold: float) -> dict[str, Tensor]:
    """Without the predictions whose score is below the threshold."""
    kept = prediction["scores"] >= threshold
    return {name: tensor[kept] for name, tensor in prediction.items()}


def truth_boxes(truth: Picture, names: Sequence[str]) -> list[Box]:
    """The objects, as `drawn` takes them."""
    pairs = zip(truth["boxes"].tolist(), truth["labels"].tolist(), strict=True)
    return [(box, TRUTH, names[label - 1]) for box, label in pairs]


def found_boxes(prediction: Picture, truth: Picture, names: Sequence[str]) -> list[Box]:
    """The predictions, right and wrong, and what was missed, as `drawn` takes them."""
    verdict = judge(prediction, truth)
    boxes: list[Box] = [
        (box, MISSED, "")
        for box, found in zip(truth["boxes"].tolist(), verdict.found, strict=True)
        if not found
    ]
    columns = (prediction[name].tolist() for name in ("boxes", "labels", "scores"))
    for box, label, score, right in zip(*columns, verdict.right, strict=True):
        boxes.append((box, RIGHT if right else WRONG, f"{names[label - 1]} {score:.2f}"))
    return boxes


def drawn(
    image: Tensor, boxes: Sequence[Box], masks: Tensor | None = None, width: int = WIDTH
) -> Image.Image:
    """An image (3, height, width) with boxes, scaled to a width in pixels.

    Args:
        masks: (n, height, width) or (n, 1, height, width) in [0, 1]: the last n boxes' own, shaded.
    """
    picture = to_pil_image(image.clamp(0, 1).cpu())
    if masks is not None:
        for mask, (_, colour, _) in zip(masks, boxes[len(boxes) - len(masks) :], strict=True):
            inside = (mask.cpu().float() > 0.5).reshape(mask.shape[-2:])
            shade = Image.fromarray(inside.mul(90).byte().numpy())
            picture.paste(Image.new("RGB", picture.size, colour), mask=shade)
    factor = width / picture.width
    picture = picture.resize((width, round(picture.height * factor)), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=LETTERS)
    scaled = [[factor * v for v in box] for box, _, _ in boxes]
    for (x1, y1, x2, y2), (_, colour, _) in zip(scaled, boxes, strict=True):
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
    named = [(at, colour, caption) for at, (_, colour, caption) in zip(scaled, boxes, strict=True) if caption]
    sizes = [(draw.textlength(caption, font) + 4, LETTERS + 3.0) for _, _, caption in named]
    places = placed([at for at, _, _ in named], sizes, *picture.size)
    for place, (_, colour, caption) in zip(places, named, strict=True):
        if place is not None:
            draw.rectangle(place, fill=colour)
            draw.text((place[0] + 2, place[1]), caption, "black", font)
    return picture


def views_of(example: Example, names: Sequence[str]) -> dict[str, Image.Image]:
    """The pictures of one row: the truth, and each state's predictions."""
    truth, image = example.truth, example.image
    views = {"truth": drawn(image, truth_boxes(truth, names), truth.get("masks"))}
    for state, found in example.found.items():
        views[state] = drawn(image, found_boxes(found, truth, names), found.get("masks"))
    return views


LEGEND = ((TRUTH, "truth"), (RIGHT, "right"), (WRONG, "false positive"), (MISSED, "missed"))


def log_to_wandb(
    logger: WandbLogger,
    key: str,
    pictures: Sequence[tuple[Tensor, Picture, Picture]],
    names: Sequence[str],
    threshold: float,
) -> None:
    """Images with truth and predictions as W&B's own boxes and masks, to be switched on and off there.

    Args:
        pictures: image (3, height, width), target, prediction.
    """
    labels = dict(enumerate(names, start=1))
    boxes, masks = [], []
    for _, truth, prediction in pictures:
        both = {"ground_truth": truth, "predictions": confident(prediction, threshold)}
        boxes.append(
            {name: {"box_data": _box_data(p, names), "class_labels": labels} for name, p in both.items()}
        )
        masks.append(
            {
                name: {"mask_data": _label_map(p).numpy(), "class_labels": {0: "background", **labels}}
                for name, p in both.items()
                if "masks" in p
            }
        )
    images = [image.clamp(0, 1).cpu() for image, _, _ in pictures]
    layers: dict[str, Any] = {"boxes": boxes, **({"masks": masks} if all(masks) else {})}
    logger.log_image(key, images, **layers)


def _box_data(picture: Picture, names: Sequence[str]) -> list[dict[str, Any]]:
    data = []
    scores = picture.get("scores", torch.ones(len(picture["labels"]))).tolist()
    for box, label, score in zip(picture["boxes"].tolist(), picture["labels"].tolist(), scores, strict=True):
        position = dict(zip(("minX", "minY", "maxX", "maxY"), box, strict=True))
        caption = f"{names[label - 1]} {score:.2f}" if "scores" in picture else names[label - 1]
        data.append(
            {"position": position, "domain": "pixel", "class_id": label, "box_caption": caption,
             "scores": {"score": score}}
        )  # fmt: skip
    return data


def _label_map(picture: Picture) -> Tensor:
    """(height, width): the label of the last object at each pixel, 0 where there is none."""
    masks = picture["masks"].cpu()
    labels = torch.zeros(masks.shape[-2:], dtype=torch.uint8)
    for mask, label in zip(masks, picture["labels"].tolist(), strict=True):
        labels[(mask.float() > 0.5).reshape(labels.shape)] = label
    return labels
