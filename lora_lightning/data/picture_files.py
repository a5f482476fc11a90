"""PictureFiles: pictures of a folder, or one, as a model is shown them; one that cannot be read is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_lightning.data.decoding import SUFFIXES, read_picture
from lora_lightning.data.findings import DataError
from lora_lightning.data.picture_rows import passed_over
from lora_lightning.errors import UserError

Shown = tuple[int, Tensor | str]


class PictureFiles(Dataset[Shown]):
    """index -> (index, what the model is shown), or (index, why the file cannot be read).

    Args:
        path: a file, whatever its name; or a folder, all of whose pictures are meant, in the order of their
            names, those of the folders in it too.
        transform: RGB picture -> (channels, height, width).

    Attributes:
        files: their paths.
        names: relative to the folder; of a single file its name.

    Raises:
        UserError: there is no such file or folder, or it holds no picture.
    """

    def __init__(self, path: str | Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.names = picture_files(path)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Shown:
        try:
            return index, self.transform(read_picture(self.files[index]))
        except DataError as error:
            return index, str(error)


def picture_files(path: str | Path) -> tuple[list[Path], list[str]]:
    """The pictures that a path means, and their names.

    Raises:
        UserError: there are none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [path], [path.name]
    if not path.is_dir():
        raise UserError(f"images={path}: there is no such file or folder. Give one that there is.")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    files = [f for f in files if not any(map(passed_over, f.relative_to(path).parts))]
    if not files:
        raise UserError(f"images={path}: holds no picture ({', '.join(SUFFIXES)}). Give a folder that does.")
    return files, [file.relative_to(path).as_posix() for file in files]


def problems_of_pictures(path: str | Path | None) -> list[str]:
    """What is wrong with the pictures that are to be predicted, one line at most; None: none are given."""
    if path is None:
        return ["no picture is named: give images=FOLDER_OR_FILE."]
    try:
        picture_files(path)
    except UserError as error:
        return [str(error)]
    return []


def columns(batch: Sequence[Shown]) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
    """A batch: the indices of what can be read with the images (n, channels, height, width), then the others
    with the reasons."""
    good = [(index, image) for index, image in batch if isinstance(image, Tensor)]
    bad = [(index, image) for index, image in batch if isinstance(image, str)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return [index for index, _ in good], images, bad
