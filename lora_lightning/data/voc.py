"""VOCDataModule: Pascal VOC 2007 and 2012, and any folder in the same layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import numpy as np

from lora_lightning.data.decoding import image_size
from lora_lightning.data.detection import Augment, DetectionDataModule, Part, Sample
from lora_lightning.data.findings import Findings
from lora_lightning.data.options import BatchSize, Folder, Seed, Workers
from lora_lightning.errors import MissingFileError, did_you_mean
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import TEXT, listed, matching
from lora_lightning.utils.progress import working

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
DEVKIT = "VOCdevkit"
SITE = "http://host.robots.ox.ac.uk/pascal/VOC"
ARCHIVES = {
    "2007_trainval": f"{SITE}/voc2007/VOCtrainval_06-Nov-2007.tar",
    "2007_test": f"{SITE}/voc2007/VOCtest_06-Nov-2007.tar",
    "2012_trainval": f"{SITE}/voc2012/VOCtrainval_11-May-2012.tar",
}
CORNERS = ("xmin", "ymin", "xmax", "ymax")
HEADERS_AT_ONCE = 16
Lists = Annotated[
    Sequence[str],
    listed("lists as YEAR_NAME, such as [2007_trainval,2012_trainval]", matching(".*_.*", "YEAR_NAME")),
]
Names = Annotated[Sequence[str], listed("different names, such as [person,car]", TEXT, distinct=True)]


class VOCDataModule(DetectionDataModule):
    """Pascal VOC (Everingham et al. 2010): images in JPEGImages, boxes in Annotations, lists in ImageSets.

    Boxes count pixels from 1, both ends inclusive; here they begin at 0 and their right and lower edges
    are exclusive. Objects marked `difficult` are left out of training, and the score ignores them, as
    VOC's own does. Scores are COCO's (`test/map_50` is the one nearest to VOC's).

    Args:
        root: the folder that holds `VOCdevkit`.
        train, val, test: lists as YEAR_NAME, such as 2007_trainval for VOC2007/ImageSets/Main/trainval.txt;
            `test` null takes the validation images.
        class_names: what is looked for; the default are VOC's 20 classes.
        batch_size, num_workers, seed, augment, strict: as for `DetectionDataModule`.

    Raises:
        ConfigError: one line for each bad option.
    """

    name = "Pascal VOC's annotations"

    def __init__(
        self,
        root: Folder = "data",
        train: Lists = ("2007_train", "2012_train"),
        val: Lists = ("2007_val",),
        test: Lists | None = ("2007_test",),
        class_names: Names = CLASSES,
        batch_size: BatchSize = 8,
        num_workers: Workers = None,
        seed: Seed = 0,
        augment: Augment = "ssd",
        strict: bool = True,
    ) -> None:
        require(VOCDataModule, locals())
        super().__init__(batch_size, num_workers, seed, augment, strict)
        self.root = Path(root).expanduser().absolute()
        self.lists: dict[Part, list[str]] = {"train": list(train), "val": list(val)}
        if test is not None:
            self.lists["test"] = list(test)
        self.class_names = list(class_names)
        self.labels = {name: label for label, name in enumerate(class_names, 1)}

    def read(self, findings: Findings) -> dict[Part, list[Sample]]:
        self._require_files()
        parts: dict[Part, list[Sample]] = {}
        first = 0
        for part, lists in self.lists.items():
            files = list(dict.fromkeys(f for name in lists for f in self._annotations(name)))
            parts[part] = self._samples(files, first, findings)
            first += len(files)
        return parts

    def _list_file(self, name: str) -> Path:
        year, _, listed = name.partition("_")
        return self.root / DEVKIT / f"VOC{year}" / "ImageSets" / "Main" / f"{listed}.txt"

    def _annotations(self, name: str) -> list[Path]:
        folder = self._list_file(name).parents[2] / "Annotations"
        # Lists of single classes have a second column.
        words = [line.split() for line in self._list_file(name).read_text().splitlines()]
        return [folder / f"{word[0]}.xml" for word in words if word]

    def _require_files(self) -> None:
        wanted = {name: self._list_file(name) for lists in self.lists.values() for name in lists}
        gone = [str(file.relative_to(self.root)) for file in wanted.values() if not file.is_file()]
        if not gone:
            return
        inside = f"\n  near miss:  data.root={self.root.parent} (the folder above)"
        fetch = "\n".join(f"              curl -LO {url}" for url in ARCHIVES.values())
        raise MissingFileError(
            f"Pascal VOC is not on this machine.\n"
            f"  files:      {', '.join(gone)}\n"
            f"  looked for: {self.root / DEVKIT}{inside * (self.root.name == DEVKIT)}\n"
            f"  to get it:  data.root=FOLDER if {DEVKIT} lies in another folder; else\n{fetch}\n"
            f"              and unpack each: tar xf NAME.tar -C {self.root}\n"
            f"  one year:   data.train=[2012_train] data.val=[2012_val] data.test=null"
        )

    def _samples(self, files: list[Path], first: int, findings: Findings) -> list[Sample]:
        images = [file.parents[1] / "JPEGImages" / f"{file.stem}.jpg" for file in files]
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            heads = pool.map(image_size, images)
            sizes = list(working(heads, "checking images", "images", len(images)))
        samples = []
        for image_id, (file, image, size) in enumerate(zip(files, images, sizes, strict=True), first):
            if size is None:
                gone = not image.is_file()
                findings.add(
                    "an image file that is missing" if gone else "a file that is no image",
                    str(image),
                    "dropped",
                )
                continue
            root = _parse(file, findings)
            if root is not None:
                objects = [self._object(o, f"{file}: object {n}", size, findings) for n, o in _objects(root)]
                samples.append(_sample(image, image_id, size, [o for o in objects if o]))
        return samples

    def _object(
        self, node: ElementTree.Element, where: str, size: tuple[int, int], findings: Findings
    ) -> tuple[list[float], int, bool] | None:
        """Box, label and whether it is difficult, or None after a finding."""
        name = (node.findtext("name") or "").strip()
        if name not in self.labels:
            findings.add(
                "an unknown category", f"{where}, {name!r}{did_you_mean(name, self.labels)}", "dropped"
            )
            return None
        try:
            left, top, right, bottom = (float(node.findtext(f"bndbox/{c}") or "nan") for c in CORNERS)
        except ValueError:
            left = top = right = bottom = math.nan
        if not math.isfinite(left + top + right + bottom):
            findings.add("a bndbox without four numbers", where, "dropped")
            return None
        width, height = size
        told = f"{where}, {left:g} {top:g} {right:g} {bottom:g} in {width} x {height}"
        if right < left or bottom < top:
            findings.add("a box of negative size", told, "dropped")
            return None
        if right < 1 or bottom < 1 or left > width or top > height:
            findings.add("a box outside of its image", told, "dropped")
            return None
        if min(left, top) < 0 or right > width + 1 or bottom > height + 1:
            findings.add("a box over the edge of its image", told, "clipped")
        box = [max(left - 1, 0), max(top - 1, 0), min(right, width), min(bottom, height)]
        return box, self.labels[name], (node.findtext("difficult") or "0").strip() == "1"


def _parse(file: Path, findings: Findings) -> ElementTree.Element | None:
    try:
        return ElementTree.parse(file).getroot()
    except FileNotFoundError:
        findings.add("an annotation file that is missing", str(file), "its image dropped")
    except (ElementTree.ParseError, OSError, ValueError) as error:
        findings.add("an annotation file that is no XML", f"{file} ({error})", "its image dropped")
    return None


def _objects(root: ElementTree.Element) -> list[tuple[int, ElementTree.Element]]:
    return list(enumerate(root.findall("object"), 1))


def _sample(image: Path, image_id: int, size: tuple[int, int], objects: list[Any]) -> Sample:
    boxes = np.array([box for box, _, _ in objects], np.float32).reshape(-1, 4)
    return Sample(
        image,
        image_id,
        *size,
        boxes,
        np.array([label for _, label, _ in objects], np.int64),
        np.array([difficult for _, _, difficult in objects], bool),
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    )
