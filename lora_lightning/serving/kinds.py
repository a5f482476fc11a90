"""What is answered of pictures: classes, objects, masks. Each kind makes units for a batch of an upload, runs
a batch, and makes an answer of what came out."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from lora_lightning.data.mask_pictures import class_colours, indexed
from lora_lightning.data.mask_transforms import evaluation_picture
from lora_lightning.data.picture_transform import FACTS as PREPROCESSING
from lora_lightning.data.picture_transform import evaluation_transform, preprocessing_of
from lora_lightning.errors import UserError
from lora_lightning.serving.inputs import BadUpload, Limits, picture_of, unstretched
from lora_lightning.tasks.detection_pictures import confident
from lora_lightning.tasks.segmentation_maps import class_maps
from lora_lightning.tasks.tellers import ANumber, teller_of

Options = Mapping[str, Any]  # of one request
Facts = Mapping[str, Any]
Told = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Base:
    """The base that is served.

    Attributes:
        model: plain, in eval mode, on its device.
        facts: what its data and task said, where an adapter says nothing.
        config: the sections `task` and `data` of its configuration.
    """

    model: nn.Module
    fabric: Fabric
    facts: Facts
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """What one upload asks of the model.

    Attributes:
        units: with the shape of each: those of one shape can run together.
        answer: of what came out of each unit, in their order.
        part: is called when one more unit is done; gives what can be told already.
    """

    units: list[tuple[Hashable, Any]]
    answer: Callable[[list[Any]], dict[str, Any]]
    part: Callable[[], list[dict[str, Any]]] | None = None


class Kind(Protocol):
    """A task."""

    name: str

    def prepare(self, body: bytes, facts: Facts, options: Options) -> Work:
        """In any thread.

        Raises:
            BadUpload: it cannot be used.
        """

    def run(self, units: Sequence[Any]) -> list[Any]:
        """Of a batch of one shape, in the thread that has the model."""


class Classes:
    """One class of several, several, or a number."""

    name = "classify"

    def __init__(self, base: Base, limits: Limits) -> None:
        self.base, self.limits = base, limits
        self.flips = bool(base.config.get("task", {}).get("test_flips", False))
        data = base.config.get("data") or {}
        self.own = preprocessing_of(base.model, data.get("image_size"), data.get("crop_pct"))

    def prepare(self, body: bytes, facts: Facts, options: Options) -> Work:
        try:
            teller = teller_of(facts, {n: options[n] for n in ("top", "threshold") if n in options})
        except UserError:
            raise _nameless() from None
        transform = evaluation_transform(facts if set(PREPROCESSING) <= facts.keys() else self.own)
        image = transform(Image.fromarray(picture_of(body, self.limits).numpy()))

        def answer(outputs: list[Tensor]) -> dict[str, Any]:
            row = teller.rows(outputs[0][None])[0]
            if isinstance(teller, ANumber):
                return row
            if "labels" in row:
                pairs = zip(row["labels"], row["probabilities"], strict=True)
            else:
                values = list(row.values())
                pairs = zip(values[::2], values[1::2], strict=True)
            return {"predictions": [{"label": label, "probability": p} for label, p in pairs]}

        return Work([(tuple(image.shape), image)], answer)

    def run(self, units: Sequence[Tensor]) -> list[Tensor]:
        images = torch.stack(list(units)).to(self.base.fabric.device)
        with self.base.fabric.autocast():
            outputs = self.base.model(images)
            if self.flips:
                outputs = (outputs + self.base.model(images.flip(-1))) / 2
        return list(outputs.float().cpu())


class Objects:
    """Boxes with classes and scores."""

    name = "detect"

    def __init__(self, base: Base, limits: Limits) -> None:
        self.base, self.limits = base, limits
        self.score = float(base.config.get("task", {}).get("score_threshold", 0.5))

    def prepare(self, body: bytes, facts: Facts, options: Options) -> Work:
        names = _class_names(facts)
        pixels = unstretched(picture_of(body, self.limits))
        image = pixels.permute(2, 0, 1).float() / 255
        height, width = pixels.shape[:2]

        def answer(outputs: list[dict[str, Tensor]]) -> dict[str, Any]:
            sure = confident(outputs[0], options.get("score", self.score))
            columns = (sure["boxes"].tolist(), sure["labels"].int().tolist(), sure["scores"].tolist())
            found = [
                {"label": names[label - 1], "score": score, "box": box}
                for box, label, score in zip(*columns, strict=True)
            ]
            return {"width": width, "height": height, "predictions": found}

        return Work([(tuple(image.shape), image)], answer)

    def run(self, units: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        with self.base.fabric.autocast():
            found = self.base.model([image.to(self.base.fabric.device) for image in units])
        return [{name: tensor.float().cpu() for name, tensor in one.items()} for one in found]


class Masks:
    """The class of every pixel."""

    name = "segment"

    def __init__(self, base: Base, limits: Limits) -> None:
        self.base, self.limits = base, limits
        self.flips = bool(base.config.get("task", {}).get("test_flips", False))

    def prepare(self, body: bytes, facts: Facts, options: Options) -> Work:
        names = _class_names(facts)
        if not {"shorter_side", "mean", "std"} <= facts.keys():
            told = "the adapter does not say how pictures were shown to it: name one that a run has saved."
            raise BadUpload(409, told)
        pixels = unstretched(picture_of(body, self.limits)).permute(2, 0, 1)
        size = int(pixels.shape[1]), int(pixels.shape[2])
        mean, std = (255 * torch.tensor(facts[name]).view(3, 1, 1) for name in ("mean", "std"))
        image = (evaluation_picture(pixels, facts["shorter_side"]).float() - mean) / std
        colours = class_colours(names, facts.get("palette"))

        def answer(outputs: list[np.ndarray]) -> dict[str, Any]:
            file = io.BytesIO()
            indexed(outputs[0], colours).save(file, "PNG")
            shares = np.bincount(outputs[0].reshape(-1), minlength=len(names)) / outputs[0].size
            classes = [
                {"label": n, "value": i, "share": s}
                for i, (n, s) in enumerate(zip(names, shares.tolist(), strict=True))
            ]
            mask = base64.b64encode(file.getvalue()).decode()
            return {"width": size[1], "height": size[0], "classes": classes, "mask": mask}

        return Work([(tuple(image.shape), (image, size))], answer)

    def run(self, units: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[np.ndarray]:
        images = [image.to(self.base.fabric.device) for image, _ in units]
        with self.base.fabric.autocast():
            maps = class_maps(self.base.model, images, [size for _, size in units], self.flips)
        return [one.cpu().numpy() for one in maps]


def _class_names(facts: Facts) -> list[str]:
    names = list(facts.get("class_names", ()))
    if not names:
        raise _nameless()
    return names


def _nameless() -> BadUpload:
    told = "neither the adapter nor the base says its classes' names: name another adapter."
    return BadUpload(409, told)
