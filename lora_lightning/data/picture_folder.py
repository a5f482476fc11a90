"""PictureFolder: the image files of a folder, to be predicted on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.decoding import LONGEST, image_size, is_strip
from lora_lightning.data.detection import read_image
from lora_lightning.errors import UserError
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.tables import truncate_list

with loading("torchvision"):
    from torchvision.io import write_png

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Picture:
    """An image file: `name` relative to its folder, `width` and `height` in pixels."""

    image_id: int
    name: str
    width: int
    height: int


class PictureFolder(Dataset[tuple[int, Tensor]]):
    """Every image file below a folder, in the order of the names: index, image (3, height, width) in [0, 1].

    The ids are the numbers by which the files are named where all are (COCO's `000000000139.jpg` is 139),
    else the places in the order, from 1.

    Args:
        folder: searched with all folders in it.

    Raises:
        UserError: there is no such folder, or no image in it, or files that are none, or strips.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"images={folder}: there is no such folder. Give one that there is.")
        files = sorted(f for f in self.folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not files:
            raise UserError(
                f"images={folder}: holds no image ({', '.join(SUFFIXES)}). Give a folder that does."
            )
        sizes = [image_size(file) for file in files]
        if bad := [str(f) for f, size in zip(files, sizes, strict=True) if size is None]:
            raise UserError(
                f"images={folder}: {truncate_list(bad)} cannot be read as images; take them away."
            )
        if strips := [str(f) for f, size in zip(files, sizes, strict=True) if size and is_strip(*size)]:
            raise UserError(
                f"images={folder}: more than {LONGEST} times as long as wide, which no detector resizes: "
                f"{truncate_list(strips)}; take them away, or cut them."
            )
        self.pictures = [
            Picture(number, str(file.relative_to(self.folder)), *size)
            for number, file, size in zip(_numbers(files), files, sizes, strict=True)
            if size
        ]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, read_image(self.folder / self.pictures[index].name).float() / 255


def draw_pictures(data: LightningDataModule, folder: Path) -> PictureFolder:
    """The test pictures of data that have no files, as PNG, named by their `image_id`."""
    folder.mkdir(parents=True, exist_ok=True)
    data.setup("test")
    for images, targets in data.test_dataloader():
        for image, target in zip(images, targets, strict=True):
            write_png((image * 255).round().byte(), str(folder / f"{int(target['image_id']):05d}.png"))
    return PictureFolder(folder)


def _numbers(files: list[Path]) -> list[int]:
    named = [int(f.stem) if f.stem.isascii() and f.stem.isdigit() else None for f in files]
    if None not in named and len(set(named)) == len(named):
        return [n for n in named if n is not None]
    return list(range(1, len(files) + 1))
