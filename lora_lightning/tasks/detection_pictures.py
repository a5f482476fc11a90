"""What a detector found, in pictures: a contact sheet, an HTML page, and W&B's boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from lora_lightning.adapters.manage import adapters_off
from lora_lightning.layers.registry import LoRALayer
from lora_lightning.report.page import Section, leave, text
from lora_lightning.report.pictures import WIDTH, key, rows_of, sheet
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.ops import box_iou
    from torchvision.transforms.functional import to_pil_image

TRUTH, RIGHT, WRONG, MISSED = "#3d8bfd", "#2fbf4f", "#e8432e", "#f2c316"
EXAMINED, SHOWN, ON_SHEET = 200, 12, 6  # test images: looked at, on the page by each order, in the sheet
Picture = Mapping[str, Any]  # boxes, labels and what belongs to them, of one image
Box = tuple[Sequence[float], str, str]  # x1 y1 x2 y2, colour, caption


@dataclass
class Verdict:
    """Which predictions are right, and which objects were found."""

    right: list[bool]
    found: list[bool]

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


def judge(prediction: Picture, truth: Picture, iou: float = 0.5) -> Verdict:
    """The surest first, each prediction takes the free object of its class that it overlaps most.

    Args:
        prediction: boxes, scores and labels.
        truth: boxes and labels; objects with `iscrowd` are never missed.
        iou: the least overlap, intersection over union.
    """
    crowd = truth.get("iscrowd", torch.zeros(len(truth["labels"]))).bool().cpu()
    overlap = box_iou(prediction["boxes"].cpu(), truth["boxes"].cpu())  # (predictions, objects)
    overlap = overlap * (prediction["labels"].cpu()[:, None] == truth["labels"].cpu()[None])
    verdict = Verdict([False] * len(overlap), crowd.tolist())
    for i in prediction["scores"].argsort(descending=True).tolist():
        free = overlap[i].masked_fill(torch.tensor(verdict.found, dtype=torch.bool), 0)
        if len(free) and free.max() >= iou:
            verdict.found[int(free.argmax())] = verdict.right[i] = True
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
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=11)
    for box, colour, caption in boxes:
        x1, y1, x2, y2 = (factor * v for v in box)
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
        if caption:
            at = (max(0, min(x1, width - draw.textlength(caption, font) - 2)), max(0, y1 - 13))
            draw.rectangle(draw.textbbox(at, caption, font), fill=colour)
            draw.text(at, caption, "black", font)
    return picture


def write_report(
    model: nn.Module, data: L.LightningDataModule, names: Sequence[str], threshold: float, folder: Path
) -> list[str]:
    """contact_sheet.png and report.html of the first test images, and one line about each.

    Args:
        model: images -> predictions, with the trained weights; if it is adapted (the very module that
            was), it is also shown as it was before.
        names: of the classes.
        threshold: the least score of a prediction that counts.
    """
    examples = _examples(model, data, threshold)
    states = list(examples[0].found)
    worst = sorted(examples, key=lambda e: -judge(e.found[states[-1]], e.truth).mistakes)
    counts = [_counts(examples, state) for state in states]
    sections = {
        f"The first {min(SHOWN, len(examples))} test images": examples[:SHOWN],
        f"Of {len(examples)} test images, those with the most mistakes after training": worst[:SHOWN],
    }
    rows = [rows_of(title, [_views(e, names) for e in shown]) for title, shown in sections.items()]
    parts = [*(f"<p>{text(line, 200)}</p>" for line in counts), key(LEGEND), *rows]
    leave(folder, [Section("Detections", "\n".join(parts))], "Detections")
    columns = [_views(example, names) for example in examples[:ON_SHEET]]
    sheet(columns, LEGEND).save(folder / "contact_sheet.png")
    return [f"{counts[-1]} (scores of at least {threshold:g}, IoU of at least 0.5)", ""]


@torch.no_grad()
def _examples(model: nn.Module, data: L.LightningDataModule, threshold: float) -> list[Example]:
    device = next(model.parameters()).device
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    adapted = any(isinstance(module, LoRALayer) for module in model.modules())
    data.setup("test")
    examples: list[Example] = []
    for batch in data.test_dataloader():
        images, targets = data.on_after_batch_transfer(batch, 0)  # as a Trainer would
        inputs = [image.to(device) for image in images]
        found: dict[str, list[Picture]] = {}
        for state in ("before", "after") if adapted else ("after",):
            with adapters_off(model) if state == "before" else nullcontext():
                found[state] = [confident(p, threshold) for p in model(inputs)]
        for i, (image, truth) in enumerate(zip(images, targets, strict=True)):
            examples.append(Example(image, truth, {state: each[i] for state, each in found.items()}))
        if len(examples) >= EXAMINED:
            break
    for name, module in model.named_modules():
        module.training = modes[name]
    return examples


def _counts(examples: Sequence[Example], state: str) -> str:
    verdicts = [judge(e.found[state], e.truth) for e in examples]
    right = sum(v.right.count(True) for v in verdicts)
    wrong = sum(v.right.count(False) for v in verdicts)
    missed = sum(v.found.count(False) for v in verdicts)
    return (
        f"{state} training: {right} right, {wrong} false positives, {missed} missed in {len(examples)} images"
    )


def _views(example: Example, names: Sequence[str]) -> dict[str, Image.Image]:
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
