"""`lora-lightning predict` with a detector: what it finds in images, as COCO's JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from hydra.utils import instantiate
from lightning import LightningDataModule
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning.app.rebuild import build
from lora_lightning.app.trained import Trained
from lora_lightning.data.picture_folder import PictureFolder, draw_pictures
from lora_lightning.errors import UserError
from lora_lightning.files.allowed import section_of
from lora_lightning.tasks.detection_pictures import confident, drawn
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.progress import Bar

RESULTS, IMAGES, PICTURES, DRAWN = "predictions.json", "images.json", "pictures", "images"
EMBEDDED = ("lora_lightning.data.shapes.ShapesDataModule",)  # data that are drawn, not found
LEAST_WIDTH = 320  # of a picture, in pixels: captions would hide a smaller one
COLOURS = ("#ff5a5f", "#3d8bfd", "#2fbf4f", "#f2c316", "#b36bff", "#ff9f40", "#20c5c5", "#ff77c8")


def problems(options: Mapping[str, Any], trained: Trained) -> list[str]:
    """What is wrong with the options, one line each, before anything is built."""
    out, found = Path(options["out"]), []
    if not options.get("overwrite") and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        found.append(f"out={out} is not empty: give another folder, or overwrite=true.")
    if "images" not in options and trained.config.get("data", {}).get("_target_") not in EMBEDDED:
        found.append("no picture is named: give images=FOLDER.")
    try:
        if "images" in options:
            PictureFolder(options["images"])
    except UserError as error:
        found.append(str(error))
    return found


def predict(options: Mapping[str, Any], trained: Trained) -> str:
    """Find objects in every image of a folder.

    Writes `predictions.json`, a list of COCO's results; `images.json`, the images and categories that
    its numbers mean, in COCO's format; and `pictures/`, each image with what was found.

    Args:
        options: of the command `predict`, by name. Without `images`, a recipe whose
            pictures are drawn has its test pictures drawn into `out/images`.

    Returns:
        What was done, in a few lines.
    """
    out, config = Path(options["out"]), trained.config
    folder = PictureFolder(options["images"]) if "images" in options else _drawn_into(out / DRAWN, trained)
    model, facts = trained.model(options.get("check_base", True))
    if not facts.get("class_names"):
        raise UserError("its data, which name the classes, are not on this machine: give recipe=NAME.")
    score = options.get("score", config["task"].get("score_threshold", 0.5))
    finder = Finder(model, trained.fabric())
    writer = Writer(out, folder, facts, score)
    loader = DataLoader(
        folder,
        options.get("batch_size", config["data"].get("batch_size", 1)),
        num_workers=options.get("num_workers", config["data"].get("num_workers") or 0),
        collate_fn=_columns,
    )
    with Bar("predicting", len(folder), "images") as bar:
        for indices, images in loader:
            for index, image, found in zip(indices, images, finder(images), strict=True):
                writer.add(index, image, found)
            bar.advance(len(indices))
    writer.close()
    return (
        f"{len(folder)} images, {writer.shown} objects with a score of at least {score:g}\n"
        f"{out / RESULTS}: all {len(writer.results)} predictions, COCO's results\n"
        f"{out / IMAGES}: the images and categories by number\n"
        f"{out / PICTURES}: the images with what was found"
    )


class Finder:
    """A detector on its device: images -> predictions on the CPU, in full precision.

    Args:
        model: images -> a list of dicts `boxes`, `labels`, `scores` and perhaps `masks`.
    """

    def __init__(self, model: nn.Module, fabric: Fabric) -> None:
        self.fabric, self.model = fabric, model.to(fabric.device)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        with self.fabric.autocast():
            found = self.model([image.to(self.fabric.device) for image in images])
        return [{name: tensor.float().cpu() for name, tensor in one.items()} for one in found]


class Writer:
    """Collects predictions as COCO's results, and draws each image with them.

    Args:
        out: the folder to write to.
        facts: `class_names`, and `category_ids` where the labels are not the category ids.
        score: pictures show what scores at least this much.
    """

    def __init__(self, out: Path, folder: PictureFolder, facts: Mapping[str, Any], score: float) -> None:
        self.out, self.folder, self.score = out, folder, score
        self.names = list(facts["class_names"])
        self.categories = list(facts.get("category_ids") or range(1, len(self.names) + 1))
        self.results: list[dict[str, Any]] = []
        self.shown = 0
        (out / PICTURES).mkdir(parents=True, exist_ok=True)

    def add(self, index: int, image: Tensor, found: Mapping[str, Tensor]) -> None:
        """Predictions of one image (3, height, width) in [0, 1]."""
        picture = self.folder.pictures[index]
        self.results += coco_results(found, picture.image_id, self.categories)
        sure = confident(found, self.score)
        self.shown += len(sure["labels"])
        labels = sure["labels"].int().tolist()
        boxes = [
            (box, COLOURS[label % len(COLOURS)], f"{self.names[label - 1]} {score:.2f}")
            for box, label, score in zip(sure["boxes"].tolist(), labels, sure["scores"].tolist(), strict=True)
        ]
        path = self.out / PICTURES / picture.name
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn(image, boxes, sure.get("masks"), width=max(picture.width, LEAST_WIDTH)).save(path)

    def close(self) -> None:
        """Write both files, whole or not at all."""
        images = [
            {"id": p.image_id, "file_name": p.name, "width": p.width, "height": p.height}
            for p in self.folder.pictures
        ]
        categories = [{"id": n, "name": name} for n, name in zip(self.categories, self.names, strict=True)]
        _write_json(self.out / IMAGES, {"images": images, "annotations": [], "categories": categories})
        _write_json(self.out / RESULTS, self.results)


def coco_results(
    found: Mapping[str, Tensor], image_id: int, categories: Sequence[int]
) -> list[dict[str, Any]]:
    """Predictions of one image as COCO's results: bbox is left, top, width, height."""
    left, top, right, bottom = found["boxes"].unbind(1)
    boxes = torch.stack([left, top, right - left, bottom - top], 1).tolist()
    results = [
        {"image_id": image_id, "category_id": categories[int(label) - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    for result, mask in zip(results, found.get("masks", []), strict=False):
        bits = np.asfortranarray((mask.reshape(mask.shape[-2:]) > 0.5).byte().numpy())
        coded = rle.encode(bits)
        result["segmentation"] = {"size": list(coded["size"]), "counts": coded["counts"].decode()}
    return results


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content)
    write_whole(path, lambda temporary: Path(temporary).write_text(text))


def _drawn_into(folder: Path, trained: Trained) -> PictureFolder:
    """The test pictures of data that draw them; by a run's configuration, data of this package alone."""
    data: LightningDataModule
    if trained.own:
        data = instantiate(OmegaConf.create(dict(trained.config["data"])))
    else:
        data = build(*section_of(trained.config, "data", trained.where))
    return draw_pictures(data, folder)


def _columns(batch: Sequence[tuple[int, Tensor]]) -> tuple[list[int], list[Tensor]]:
    indices, images = zip(*batch, strict=True)
    return list(indices), list(images)
