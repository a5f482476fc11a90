"""The aerial photographs of the package deepforest, cut to tiles and written in COCO's format.

Boxes around trees, 10 cm a pixel: two pictures of Yellowstone (574 and 279 boxes), one of Florida (61) and
one of California (37). The package (Weinstein et al. 2020, MIT) is unpacked and not installed.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.real_files import FOLDER

VISIBLE = 0.5  # least share of a box inside of a tile; what is cut off more is no box there
DATA = "deepforest/data"
YELLOWSTONE = f"{DATA}/2019_YELL_2_528000_4978000_image_crop2.png"
YELLOWSTONE_VAL = f"{DATA}/2019_YELL_2_541000_4977000_image_crop.png"
FLORIDA, CALIFORNIA = f"{DATA}/OSBS_029.png", f"{DATA}/SOAP_061.png"
SHA256 = {
    YELLOWSTONE: "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
    YELLOWSTONE_VAL: "178e58a23cc2642226a364a30f71bd9258ddc1b012c826f12250914a90c7a131",
    FLORIDA: "d9477c6a00e4902c7bee487d4c5582c3b8b9a2f77f3908a29628b816b291e6ee",
    CALIFORNIA: "256508f1a62149bec4a80879077a865caf50e8cace095e6564c76befa480d424",
}
HOW = """Get them, outside of the repository, and say where with LORA_LIGHTNING_REAL=FOLDER:
  mkdir -p FOLDER && cd FOLDER
  pip download --no-deps deepforest==2.1.0
  python -m zipfile -e deepforest-2.1.0*.whl ."""


@dataclass(frozen=True)
class Photograph:
    """An aerial picture (height, width, 3), uint8, and boxes (n, 4) in it: left, top, right, bottom."""

    name: str
    pixels: np.ndarray
    boxes: np.ndarray

    def tiles(self, height: int, width: int) -> Iterator[Photograph]:
        """Cut side by side, the last of each row and column moved inwards."""
        tall, wide = self.pixels.shape[:2]
        for top in _starts(tall, height):
            for left in _starts(wide, width):
                yield self.cut(left, top, left + width, top + height)

    def cut(self, left: int, top: int, right: int, bottom: int) -> Photograph:
        """A part of the picture with the boxes that lie in it by VISIBLE at least."""
        frame = np.array([left, top, right, bottom], np.float32)
        boxes = self.boxes.clip([left, top, left, top], [right, bottom, right, bottom])
        kept = _areas(boxes) >= VISIBLE * _areas(self.boxes)
        name = f"{Path(self.name).stem}_{left}_{top}.png"
        return Photograph(name, self.pixels[top:bottom, left:right], boxes[kept] - frame[[0, 1, 0, 1]])


def read_photograph(name: str) -> Photograph:
    """One of SHA256's pictures, and what its XML file says."""
    file = FOLDER / name
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))
    objects = ElementTree.parse(file.with_suffix(".xml")).getroot().iter("bndbox")
    sides = ("xmin", "ymin", "xmax", "ymax")
    boxes = [[float(found.findtext(side, "")) for side in sides] for found in objects]
    return Photograph(file.name, pixels, np.array(boxes, np.float32))


def write_coco(parts: list[Photograph], folder: Path) -> tuple[str, str]:
    """Pictures and their annotations in COCO's format; returns the folder and the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, part in enumerate(parts, 1):
        height, width = part.pixels.shape[:2]
        Image.fromarray(part.pixels).save(folder / part.name)
        images.append({"id": number, "file_name": part.name, "width": width, "height": height})
        for left, top, right, bottom in part.boxes.tolist():
            box = [left, top, right - left, bottom - top]
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": 1,
                "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
            })  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "tree"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return str(folder), str(path)


def _starts(length: int, size: int) -> list[int]:
    return [min(start, length - size) for start in range(0, length, size)]


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
