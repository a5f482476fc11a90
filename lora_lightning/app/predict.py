"""`lora-lightning predict`: what a detector finds in a folder of images, as COCO's JSON and as pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from hydra.utils import get_object, instantiate
from lightning import LightningDataModule
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_lightning.adapters.manage import merge as merge_adapters
from lora_lightning.app.command_line import command_config
from lora_lightning.app.options import checks_in, precision_of
from lora_lightning.app.rebuild import build, rebuilt_model
from lora_lightning.data.picture_folder import PictureFolder, draw_pictures
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.files.allowed import plain_values, section_of, target_of
from lora_lightning.files.format import write_adapter
from lora_lightning.files.locate import AdapterSource, read_source
from lora_lightning.files.save_load import load_adapter
from lora_lightning.tasks.detection import ObjectDetector
from lora_lightning.tasks.detection_pictures import confident, drawn
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.marks import show

RESULTS, IMAGES, PICTURES, DRAWN = "predictions.json", "images.json", "pictures", "images"
EMBEDDED = ("lora_lightning.data.shapes.ShapesDataModule",)  # data that are drawn, not found
LEAST_WIDTH = 320  # of a picture, in pixels: captions would hide a smaller one
USED = (  # options of a run
    "task.score_threshold", "trainer.accelerator", "trainer.precision", "data.batch_size", "data.num_workers",
)  # fmt: skip
COLOURS = ("#ff5a5f", "#3d8bfd", "#2fbf4f", "#f2c316", "#b36bff", "#ff9f40", "#20c5c5", "#ff77c8")


def predict(options: Mapping[str, Any], words: Sequence[str]) -> str:
    """Find objects in every image of a folder.

    Writes `predictions.json`, a list of COCO's results; `images.json`, the images and categories that
    its numbers mean, in COCO's format; and `pictures/`, each image with what was found.

    Args:
        options: of the command `predict`, by name. Without `images`, a recipe whose
            pictures are drawn has its test pictures drawn into `out/images`.
        words: `recipe=NAME key=value …`; none takes the run that the adapter or checkpoint lies in.

    Returns:
        What was done, in a few lines.

    Raises:
        UserError: every mistake in one message, before the model is built.
    """
    source, config, folder = _checked(options, words)
    out = Path(options["out"]).expanduser()
    if folder is None:
        folder = draw_pictures(_drawing(config, None if words else source), out / DRAWN)
    known = source.facts() if source and words else None
    model, facts = rebuilt_model(config, None if words else source, known)
    if not facts.get("class_names"):
        raise UserError("its data, which name the classes, are not on this machine: give recipe=NAME.")
    if source:
        _adapt(model, source, options.get("check_base", True))
    trainer = {"accelerator": "auto", "precision": "32-true", **config["trainer"]}
    score = options.get("score", config["task"].get("score_threshold", 0.5))
    finder = Finder(model, trainer["accelerator"], trainer["precision"])
    writer = Writer(out, folder, facts, score)
    loader = DataLoader(
        folder,
        options.get("batch_size", config["data"].get("batch_size", 1)),
        num_workers=options.get("num_workers", config["data"].get("num_workers") or 0),
        collate_fn=_columns,
    )
    with tqdm(total=len(folder), unit="image", desc="predicting", disable=None) as bar:
        for indices, images in loader:
            for index, image, found in zip(indices, images, finder(images), strict=True):
                writer.add(index, image, found)
            bar.update(len(indices))
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
        accelerator, precision: as a Trainer's; on the CPU always float32.
    """

    def __init__(self, model: nn.Module, accelerator: str = "cpu", precision: Any = None) -> None:
        here = Fabric(accelerator=accelerator, devices=1)
        precision = precision_of(precision)
        fast = here.device.type != "cpu" and precision.endswith("mixed")
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=precision if fast else "32-true")
        self.model = model.eval().to(self.fabric.device)

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


def _checked(
    options: Mapping[str, Any], words: Sequence[str]
) -> tuple[AdapterSource | None, Mapping[str, Any], PictureFolder | None]:
    """The adapter, the configuration and the images (None: to be drawn), or every mistake at once."""
    problems = []
    if "adapter" in options and "ckpt" in options:
        problems.append("adapter and ckpt: give one of the two.")
    out = Path(options["out"]).expanduser()
    if not options.get("overwrite") and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        problems.append(f"out={out} is not empty: give another folder, or overwrite=true.")
    source = folder = None
    config: Mapping[str, Any] = {}
    try:
        if "images" in options:
            folder = PictureFolder(options["images"])
    except UserError as error:
        problems.append(str(error))
    try:
        if given := options.get("adapter") or options.get("ckpt"):
            source = read_source(given)
        config = _config(source, words)
    except ConfigError as error:
        problems += error.problems
    except UserError as error:
        problems.append(str(error))
    if "images" not in options and config.get("data", {}).get("_target_") not in EMBEDDED:
        problems.append("give images=FOLDER.")
    if problems:
        raise UserError("\n".join(problems))
    return source, config, folder


def _config(source: AdapterSource | None, words: Sequence[str]) -> Mapping[str, Any]:
    """Of the command line, or of the run, if it is a detector's."""
    if words and not any(word.startswith("recipe=") for word in words):
        raise UserError(f"{' '.join(words)}: give recipe=NAME with it.")
    config = command_config(words) if words else _config_of_run(source) if source else {}
    if not config:
        where = f"{source.path} lies in no run of the training application: " if source else ""
        raise UserError(f"{where}give recipe=NAME.")
    task = config["task"]["_target_"]
    if not _is_detector(task):
        name = next((w for w in words if w.startswith("recipe=")), str(source.path) if source else "")
        raise UserError(
            f"{name}: its task, {task}, finds no objects. Give a detector's, such as fcos_shapes."
        )
    return config


def _config_of_run(source: AdapterSource) -> dict[str, Any]:
    """The sections of a run that are used here, all plain: they may have come with a download."""
    config, where = source.config(), source.config_file
    if not config:
        return {}
    target_of(config, "task", where)
    section_of(config, "model", where)
    if source.facts() is None:
        section_of(config, "data", where)
    sections = {name: plain_values(config, name, where) for name in ("task", "model", "data", "trainer")}
    checks = checks_in(sections)
    for path in USED:
        section, _, name = path.partition(".")
        if not isinstance(sections[section], dict):
            raise UserError(f"{where}: {section}={show(sections[section])}: the file is damaged.")
        values, check = sections[section], checks.get(path)
        if check and name in values and not check.allows(value := values[name]):
            raise UserError(
                f"{where}: {path}={show(value)}: the file is damaged: give {check.allowed} there."
            )
    return sections


def _drawing(config: Mapping[str, Any], source: AdapterSource | None) -> LightningDataModule:
    """The data that draw their pictures; None: by the user's own words."""
    if source is None:
        return instantiate(OmegaConf.create(dict(config["data"])))
    return build(*section_of(config, "data", source.config_file))


def _is_detector(target: str) -> bool:
    found = get_object(target)
    return isinstance(found, type) and issubclass(found, ObjectDetector)


def _adapt(model: nn.Module, source: AdapterSource, check_base: bool) -> None:
    """Load the adapter and merge it: the same predictions, at the speed of the plain model."""
    if source.path.is_dir():
        load_adapter(model, source.path, check_base=check_base)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(folder, source.saved)
            load_adapter(model, folder, check_base=check_base)
    merge_adapters(model)


def _columns(batch: Sequence[tuple[int, Tensor]]) -> tuple[list[int], list[Tensor]]:
    indices, images = zip(*batch, strict=True)
    return list(indices), list(images)
