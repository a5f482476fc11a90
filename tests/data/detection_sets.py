"""Small detection data sets in the files of COCO, Pascal VOC and Penn-Fudan, written by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def coco_content(count: int = 6, first: int = 0) -> dict[str, Any]:
    """Images in turn landscape, portrait and empty; two boxes on those that have any, one a crowd."""
    images, annotations = [], []
    for n in range(count):
        width, height = (96, 64) if n % 3 == 0 else (64, 96)
        image_id = 100 + first + n
        images.append({"id": image_id, "file_name": f"{first + n}.jpg", "width": width, "height": height})
        if n % 3 < 2:
            runs = {"size": [height, width], "counts": [0, 4 * height, height * (width - 4)]}
            polygon = [[10, 10, 40, 10, 40, 40, 10, 40]]
            boxes = [([10, 10, 30, 30], 18, 0, polygon), ([0, 0, 4, height], 3, 1, runs)]
            if n % 6 == 0:
                boxes.append(([50, 20, 14, 20], 3, 0, [[50, 20, 64, 20, 64, 40, 50, 40]]))
            for box, category, crowd, segmentation in boxes:
                annotations.append(
                    {
                        "id": 1000 * (first + 1) + len(annotations),
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": box,
                        "area": 0.5 * box[2] * box[3],
                        "iscrowd": crowd,
                        "segmentation": segmentation,
                    }
                )
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_coco(images: Path, annotations: Path, content: dict[str, Any]) -> None:
    images.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    for n, entry in enumerate(content["images"]):
        picture(entry["width"], entry["height"], n).save(images / entry["file_name"])
    annotations.write_text(json.dumps(content))


def write_coco_2017(root: Path, train: int = 6, val: int = 3) -> Path:
    """A folder as COCO unpacks."""
    for part, content in (("train", coco_content(train)), ("val", coco_content(val, first=train))):
        write_coco(root / f"{part}2017", root / "annotations" / f"instances_{part}2017.json", content)
    return root


VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def write_voc(root: Path, year: str, lists: dict[str, dict[str, list[tuple[Any, ...]]]]) -> Path:
    """`lists`: list name -> image name -> objects (name, box, difficult), on images of 96 x 64."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for listed, images in lists.items():
        (folder / "ImageSets" / "Main" / f"{listed}.txt").write_text("\n".join(images) + "\n")
        for n, (image, objects) in enumerate(images.items()):
            picture(96, 64, n).save(folder / "JPEGImages" / f"{image}.jpg")
            body = "".join(VOC_OBJECT.format(name=o[0], box=o[1], difficult=o[2]) for o in objects)
            (folder / "Annotations" / f"{image}.xml").write_text(f"<annotation>{body}</annotation>")
    return root


def write_pennfudan(root: Path, count: int = 8) -> Path:
    """Two people on each image but the first, on which there is none."""
    folder = root / "PennFudanPed"
    for name in ("PNGImages", "PedMasks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for n in range(count):
        picture(80, 60, n).save(folder / "PNGImages" / f"FudanPed{n:05d}.png")
        mask = np.zeros((60, 80), np.uint8)
        if n:
            mask[10:50, 5:25] = 1
            mask[20:40, 40:60] = 2
        Image.fromarray(mask).save(folder / "PedMasks" / f"FudanPed{n:05d}_mask.png")
    return root
