"""CocoDataModule: COCO itself, and any folder of images annotated in its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from lora_lightning.data.coco_files import CocoCheck, categories_of, read_coco
from lora_lightning.data.detection import Augment, DetectionDataModule, Part, Sample
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.options import BatchSize, Folder, Seed, Workers
from lora_lightning.errors import MissingFileError, did_you_mean
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import path

with loading("torchvision"):
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

Annotations = Annotated[str, path("a JSON file of COCO's format")]
GAP = "N/A"  # what torchvision calls a category id that no category has


class CocoFormatDataModule(DetectionDataModule):
    """Images in folders and their boxes in files of COCO's format (Lin et al. 2014, arXiv 1405.0312).

    Labels are the categories in the order of their ids, from 1, whatever the ids are. Crowd regions are
    left out of training and kept for the score, which ignores what is found in them.

    Args:
        train_images, val_images, test_images: folders, to which `file_name` is relative.
        train_annotations, val_annotations, test_annotations: JSON files. Without test images the
            validation images are the test images.
        keep_category_ids: labels are the category ids themselves, as torchvision's weights of COCO were
            trained; ids that no category has are classes without objects.
        masks: read the segmentations, too.
        batch_size, num_workers, seed, augment, strict: as for `DetectionDataModule`.

    Raises:
        ConfigError: one line for each bad option.
    """

    def __init__(
        self,
        train_images: Folder,
        train_annotations: Annotations,
        val_images: Folder,
        val_annotations: Annotations,
        test_images: Folder | None = None,
        test_annotations: Annotations | None = None,
        keep_category_ids: bool = False,
        masks: bool = False,
        batch_size: BatchSize = 2,
        num_workers: Workers = None,
        seed: Seed = 0,
        augment: Augment = "flip",
        strict: bool = True,
    ) -> None:
        test = {"test_images": test_images, "test_annotations": test_annotations}
        lacking = [name for name, value in test.items() if value is None]
        alone = [f"{name}=null: give both of {' and '.join(test)}, or neither." for name in lacking]
        require(CocoFormatDataModule, locals(), alone if len(lacking) == 1 else ())
        super().__init__(batch_size, num_workers, seed, augment, strict)
        self.files: dict[Part, tuple[Path, Path]] = {
            "train": (_absolute(train_images), _absolute(train_annotations)),
            "val": (_absolute(val_images), _absolute(val_annotations)),
        }
        if test_images is not None and test_annotations is not None:
            self.files["test"] = (_absolute(test_images), _absolute(test_annotations))
        self.keep_category_ids, self.masks = keep_category_ids, masks

    def require_files(self) -> None:
        """Nothing if every folder and file is there.

        Raises:
            MissingFileError: which are not.
        """
        gone = [
            f"images {f}: there is no such folder. Give one that there is."
            for f, _ in self.files.values()
            if not f.is_dir()
        ]
        for _, notes in self.files.values():
            if not notes.is_file():
                hint = did_you_mean(notes.name, [p.name for p in notes.parent.glob("*.json")])
                gone.append(f"annotations {notes}: there is no such file.{hint} Give one that there is.")
        if gone:
            raise MissingFileError("\n".join(gone))

    def read(self, findings: Findings) -> dict[Part, list[Sample]]:
        contents = self._contents()
        labels = self._labels(
            categories_of([(self.files[p][1], c) for p, c in contents.items()], findings), findings
        )
        parts: dict[Part, list[Sample]] = {}
        for part, content in contents.items():
            images, notes = self.files[part]
            parts[part] = CocoCheck(notes, images, labels, findings, self.masks).samples(content)
        return parts

    def _labels(self, names: Mapping[int, str], findings: Findings) -> dict[int, int]:
        """Category id -> label; sets `class_names` and `category_ids`."""
        self.category_ids = (
            list(range(1, max(names, default=0) + 1)) if self.keep_category_ids else list(names)
        )
        self.class_names = [names.get(number, GAP) for number in self.category_ids]
        return {number: label for label, number in enumerate(self.category_ids, 1) if number in names}

    def _contents(self) -> Mapping[Part, dict[str, list[Any]]]:
        """All files, or everything that is wrong with any."""
        self.require_files()
        errors: list[str] = []
        contents: dict[Part, dict[str, list[Any]]] = {}
        for part, (_, notes) in self.files.items():
            try:
                contents[part] = read_coco(notes)
            except DataError as error:
                errors.append(str(error))
        if errors:
            raise DataError("\n".join(errors))
        return contents


class CocoDataModule(CocoFormatDataModule):
    """COCO 2017: 118,287 training and 5,000 validation images of 80 classes, in its own folders.

    Args:
        root: the folder that holds `train2017`, `val2017` and `annotations`.
        keep_category_ids: on, since torchvision's detectors know COCO's classes by their category ids.
        masks, batch_size, num_workers, seed, augment, strict: as for `CocoFormatDataModule`.
    """

    name = "COCO's annotations"

    def __init__(
        self,
        root: Folder = "data/coco",
        keep_category_ids: bool = True,
        masks: bool = False,
        batch_size: BatchSize = 2,
        num_workers: Workers = None,
        seed: Seed = 0,
        augment: Augment = "flip",
        strict: bool = True,
    ) -> None:
        require(CocoDataModule, locals())
        self.root = Path(root).expanduser().absolute()
        notes = self.root / "annotations"
        names = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
        self.categories = {number: name for number, name in enumerate(names) if number and name != GAP}
        super().__init__(
            train_images=str(self.root / "train2017"),
            train_annotations=str(notes / "instances_train2017.json"),
            val_images=str(self.root / "val2017"),
            val_annotations=str(notes / "instances_val2017.json"),
            keep_category_ids=keep_category_ids,
            masks=masks,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            strict=strict,
        )

        # Known without the files, so that a model's missing weights are named together with them.
        self.category_ids = list(range(1, len(names)) if keep_category_ids else self.categories)
        self.class_names = [names[number] for number in self.category_ids]

    def _labels(self, names: Mapping[int, str], findings: Findings) -> dict[int, int]:
        for category, name in names.items():
            if self.categories.get(category) != name:
                told = f"{category} {name!r}: give data=coco_format for other classes"
                findings.add("a category that COCO does not have", told, "dropped")
        numbered = enumerate(self.category_ids, 1)
        return {n: label for label, n in numbered if n in names and names[n] == self.categories.get(n)}

    def require_files(self) -> None:
        wanted = [p for images, notes in self.files.values() for p in (images, notes)]
        if not (gone := [str(p.relative_to(self.root)) for p in wanted if not p.exists()]):
            return
        site = "http://images.cocodataset.org"
        raise MissingFileError(
            f"COCO is not on this machine.\n"
            f"  files:      {', '.join(gone)}\n"
            f"  looked for: {self.root}\n"
            f"  to get it:  data.root=FOLDER if it lies in another folder; else, 20 GB,\n"
            f"              curl -LO {site}/zips/train2017.zip\n"
            f"              curl -LO {site}/zips/val2017.zip\n"
            f"              curl -LO {site}/annotations/annotations_trainval2017.zip\n"
            f"              and unpack each: unzip NAME.zip -d {self.root}\n"
            f"  other data: data=coco_format data.train_images=FOLDER data.train_annotations=FILE …"
        )


def _absolute(name: str) -> Path:
    return Path(name).expanduser().absolute()
