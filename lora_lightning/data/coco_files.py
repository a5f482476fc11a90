"""Annotation files in COCO's format: read, checked in one pass, made into samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

from lora_lightning.data.decoding import image_size
from lora_lightning.data.detection import Sample
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.utils.marks import is_number, is_whole
from lora_lightning.utils.progress import working

PARTS = ("images", "annotations", "categories")
HEADERS_AT_ONCE = 16
ROUNDING = 1.0  # pixels by which a box may stand over the edge: it is clipped without a word

# Keys by which other formats give themselves away.
FOREIGN = {
    "shapes": "LabelMe",
    "_via_img_metadata": "VGG Image Annotator",
    "_via_settings": "VGG Image Annotator",
}


def read_coco(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of an annotation file.

    Raises:
        DataError: it is no JSON, or JSON of another format.
    """
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not JSON: {str(error)[:150]}. Give an annotation file of COCO's."
        ) from None
    if problem := _foreign(content):
        raise DataError(
            f"{file} is not in COCO's format: {problem}\n"
            'Give {"images": [{"id", "file_name", "width", "height"}, …], '
            '"annotations": [{"id", "image_id", "category_id", "bbox": [left, top, width, height]}, …], '
            '"categories": [{"id", "name"}, …]}.'
        )
    return content


def _foreign(content: Any) -> str | None:
    if isinstance(content, list):
        keys = set(content[0]) if content and isinstance(content[0], dict) else set()
        detections = {"image_id", "score"} <= keys
        return "it is a list" + (": COCO *results*, the output of a detector." if detections else ".")
    if not isinstance(content, dict):
        return f"it is a {type(content).__name__}."
    missing = [name for name in PARTS if not isinstance(content.get(name), list)]
    if not missing:
        return None
    maker = next((tool for key, tool in FOREIGN.items() if key in content), None)
    there = ", ".join(map(repr, list(content)[:6])) or "nothing at all"
    seems = f" This looks like {maker}." if maker else ""
    return f"it has no list {' and no '.join(missing)}, but {there}.{seems}"


class CocoCheck:
    """One pass over an annotation file: what is whole becomes samples, what is not becomes findings.

    Args:
        file: the annotations; `folder`: where the images lie.
        labels: category id -> label, from 1.
        findings: takes in what is wrong.
        masks: read the segmentations too.
    """

    def __init__(
        self, file: Path, folder: Path, labels: Mapping[int, int], findings: Findings, masks: bool = False
    ) -> None:
        self.file, self.folder, self.labels, self.masks = file, folder, labels, masks
        self.findings = findings

    def samples(self, content: Mapping[str, list[Any]]) -> list[Sample]:
        """The images that can be read, each with its whole annotations, in the order of the file."""
        images = self._images(content["images"])
        objects: dict[int, list[tuple[Any, ...]]] = {image_id: [] for image_id in images}
        broken = {e["id"] for e in content["images"] if is_whole(_get(e, "id"))} - images.keys()
        seen: set[Any] = set()
        for place, entry in enumerate(content["annotations"]):
            where = f"{self.file.name}: annotation {_name(entry, place)}"
            image_id = _get(entry, "image_id")
            if not isinstance(entry, dict):
                self._bad("an annotation that is no mapping", where)
            elif is_whole(image_id) and image_id in broken:
                continue  # its image is named already
            elif not is_whole(image_id) or image_id not in images:
                self._bad("an annotation of an unknown image", f"{where}, image_id {image_id!r}")
            elif (found := self._object(entry, where, images[image_id], seen)) is not None:
                objects[image_id].append(found)
        return [
            _sample(path, image_id, width, height, objects[image_id], self.masks)
            for image_id, (path, width, height) in images.items()
        ]

    def _bad(self, what: str, where: str, remedy: str = "dropped", harmless: bool = False) -> None:
        self.findings.add(what, where, remedy, harmless)

    def _images(self, entries: list[Any]) -> dict[int, tuple[Path, int, int]]:
        """Path and size of each image by its id; sizes are those of the files themselves."""
        listed: dict[int, tuple[Path, Any, Any]] = {}
        for place, entry in enumerate(entries):
            where = f"{self.file.name}: image {_name(entry, place)}"
            image_id, name = _get(entry, "id"), _get(entry, "file_name")
            if not is_whole(image_id) or not isinstance(name, str) or not name:
                self._bad("an image without a whole id and a file_name", where)
            elif image_id in listed:
                self._bad("an image id given twice", where, "the second dropped")
            else:
                listed[image_id] = (self.folder / name, entry.get("width"), entry.get("height"))
        found: dict[int, tuple[Path, int, int]] = {}
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            heads = pool.map(image_size, [path for path, _, _ in listed.values()])
            sizes = working(heads, "checking images", "images", len(listed))
            for (image_id, (path, width, height)), size in zip(listed.items(), sizes, strict=True):
                where = f"{self.file.name}: image {image_id}, {path}"
                if size is None:
                    gone = not path.is_file()
                    self._bad("an image file that is missing" if gone else "a file that is no image", where)
                elif (width, height) not in (size, (None, None)):
                    told = f"{where} is {size[0]} x {size[1]}, not {width} x {height}"
                    self._bad("an image of another size than annotated", told)
                else:
                    found[image_id] = (path, *size)
        return found

    def _object(
        self, entry: dict[str, Any], where: str, image: tuple[Path, int, int], seen: set[Any]
    ) -> tuple[Any, ...] | None:
        """Box (4), label, crowd, area and segmentation, or None after a finding."""
        own, box = entry.get("id"), entry.get("bbox")
        category: Any = entry.get("category_id")
        _, width, height = image
        if own is not None and (not is_whole(own) or own in seen):
            self._bad(
                "an annotation id given twice" if is_whole(own) else "an annotation without a whole id", where
            )
            return None
        seen.add(own)
        if not is_whole(category) or (label := self.labels.get(category)) is None:
            self._bad("an unknown category", f"{where}, category_id {category!r}")
            return None
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            self._bad("a bbox that is not four numbers", f"{where}, {json.dumps(box)[:60]}")
            return None
        left, top, wide, high = map(float, box)
        told = f"{where}, bbox {box} in {width} x {height}"
        if wide < 0 or high < 0:
            self._bad("a box of negative size", told)
            return None
        right, bottom = left + wide, top + high
        if wide and high and (right <= 0 or bottom <= 0 or left >= width or top >= height):
            self._bad("a box outside of its image", told)
            return None
        over = max(-left, -top, right - width, bottom - height)
        left, right = max(left, 0.0), min(right, float(width))
        top, bottom = max(top, 0.0), min(bottom, float(height))
        if right - left <= 0 or bottom - top <= 0:
            self._bad("a box of no size", told, "dropped, as in any case", harmless=True)
            return None
        if over > ROUNDING:
            self._bad("a box over the edge of its image", told, "clipped")
        segmentation = entry.get("segmentation")
        if self.masks and not _drawable(segmentation, width, height):
            self._bad("a segmentation that cannot be drawn", f"{where}, {json.dumps(segmentation)[:60]}")
            return None
        area: Any = entry.get("area")
        area = float(area) if is_number(area) and area > 0 else (right - left) * (bottom - top)
        crowd = entry.get("iscrowd") in (1, True)
        return (left, top, right, bottom), label, crowd, area, segmentation


def categories_of(
    contents: Iterable[tuple[Path, Mapping[str, list[Any]]]], findings: Findings
) -> dict[int, str]:
    """Category id -> name of all files together; files must agree."""
    names: dict[int, str] = {}
    for file, content in contents:
        here: set[int] = set()
        for place, entry in enumerate(content["categories"]):
            where = f"{file.name}: category {_name(entry, place)}"
            category, name = _get(entry, "id"), _get(entry, "name")
            if not is_whole(category) or category < 0 or not isinstance(name, str) or not name:
                findings.add("a category without an id of at least 0 and a name", where, "dropped")
            elif category in here:
                findings.add("a category id given twice", where, "the second dropped")
            elif names.get(category, name) != name:
                told = f"{where} is {name!r} here, {names[category]!r} before"
                findings.add("a category with two names", told, "the first is kept")
            else:
                names[category] = name
            if is_whole(category):
                here.add(category)
    return dict(sorted(names.items()))


def draw(segmentations: tuple[Any, ...], height: int, width: int) -> np.ndarray:
    """Polygons or run lengths as masks (n, height, width), uint8."""
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for index, segmentation in enumerate(segmentations):
        masks[index] = rle.decode(_encoded(segmentation, height, width))
    return masks


def _encoded(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def _drawable(segmentation: Any, width: int, height: int) -> bool:
    if isinstance(segmentation, list):
        return bool(segmentation) and all(
            isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(is_number, p))
            for p in segmentation
        )
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        return False
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        return all(is_whole(c) and c >= 0 for c in counts) and sum(counts) == width * height
    return isinstance(counts, str) and bool(counts)


def _sample(
    path: Path, image_id: int, width: int, height: int, objects: list[tuple[Any, ...]], masks: bool
) -> Sample:
    boxes, labels, crowd, area, segmentations = zip(*objects, strict=True) if objects else ((),) * 5
    return Sample(
        path,
        image_id,
        width,
        height,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(crowd, bool),
        np.array(area, np.float32),
        partial(draw, segmentations, height, width) if masks else None,
    )


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _name(entry: Any, place: int) -> str:
    """An entry's id, or its place in the list where it has none."""
    own = _get(entry, "id")
    return str(own) if is_whole(own) else f"at place {place}"
