"""PennFudanDataModule: pedestrians with masks, the data set of torchvision's fine-tuning tutorial."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from lora_lightning.data.decoding import image_size, opened_image
from lora_lightning.data.detection import Augment, DetectionDataModule, Part, Sample
from lora_lightning.data.findings import Findings
from lora_lightning.data.options import BatchSize, Count, Folder, Seed, Workers
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.utils.checks import require

FOLDER = "PennFudanPed"
URL = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
SPLIT_SEED = 0


class PennFudanDataModule(DetectionDataModule):
    """Penn-Fudan pedestrians (Wang et al. 2007): 170 images, 345 people, one class.

    Every person has a number in the image's mask, from which the boxes are taken. The set has no split:
    the images are shuffled once and for all, whatever the options, and the last ones are for testing.

    Args:
        root: the folder that holds `PennFudanPed`.
        val_size, test_size: images for validation and for testing; the rest is trained on.
        batch_size, num_workers, seed, augment, strict: as for `DetectionDataModule`.

    Raises:
        ConfigError: one line for each bad option.
    """

    name = "Penn-Fudan's masks"

    def __init__(
        self,
        root: Folder = "data",
        val_size: Count = 20,
        test_size: Count = 50,
        batch_size: BatchSize = 2,
        num_workers: Workers = None,
        seed: Seed = 0,
        augment: Augment = "flip",
        strict: bool = True,
    ) -> None:
        require(PennFudanDataModule, locals())
        super().__init__(batch_size, num_workers, seed, augment, strict)
        self.root = Path(root).expanduser().absolute()
        self.val_size, self.test_size = val_size, test_size
        self.class_names = ["person"]

    def read(self, findings: Findings) -> dict[Part, list[Sample]]:
        folder = self.root / FOLDER
        files = sorted((folder / "PNGImages").glob("*.png"))
        if not files or not (folder / "PedMasks").is_dir():
            raise MissingFileError(
                f"Penn-Fudan is not on this machine.\n"
                f"  files:      PNGImages and PedMasks\n"
                f"  looked for: {folder}\n"
                f"  to get it:  data.root=FOLDER if {FOLDER} lies in another folder; else, 54 MB,\n"
                f"              curl -LO {URL}\n"
                f"              and unpack it: unzip PennFudanPed.zip -d {self.root}"
            )
        if self.val_size + self.test_size >= len(files):
            told = f"val_size={self.val_size}, test_size={self.test_size}: there are {len(files)} images"
            raise ConfigError([f"{told}; give fewer, so that some are left to train on."])
        samples = {n: s for n, file in enumerate(files) if (s := _sample(n, file, findings))}
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
        train = len(files) - self.val_size - self.test_size
        split: dict[Part, list[int]] = {
            "train": sorted(order[:train]),
            "val": sorted(order[train : train + self.val_size]),
            "test": sorted(order[train + self.val_size :]),
        }
        return {p: [samples[n] for n in ns if n in samples] for p, ns in split.items()}


def _sample(image_id: int, file: Path, findings: Findings) -> Sample | None:
    mask = file.parents[1] / "PedMasks" / f"{file.stem}_mask.png"
    size, other = image_size(file), image_size(mask)
    if size is None or other is None:
        bad = file if size is None else mask
        findings.add(
            "a file that is no image" if bad.is_file() else "a mask that is missing", str(bad), "dropped"
        )
    elif size != other:
        told = f"{mask} is {other[0]} x {other[1]}, {file.name} {size[0]} x {size[1]}"
        findings.add("a mask of another size than its image", told, "dropped")
    else:
        masks = read_masks(mask)
        count = len(masks)
        return Sample(
            file,
            image_id,
            *size,
            np.array([_box(m) for m in masks], np.float32).reshape(-1, 4),
            np.ones(count, np.int64),
            np.zeros(count, bool),
            masks.sum((1, 2), dtype=np.float32),
            partial(read_masks, mask),
        )
    return None


def read_masks(file: Path) -> np.ndarray:
    """An image in which every object has a number of its own -> (n, height, width), uint8."""
    with opened_image(file) as image:
        numbers = np.array(image)
    return (numbers == np.unique(numbers[numbers > 0])[:, None, None]).astype(np.uint8)


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
