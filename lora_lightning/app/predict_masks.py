"""`lora-lightning predict` with a segmentation model: a mask and an overlay of each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lora_lightning.app.prediction_files import Row, write_rows
from lora_lightning.app.trained import Trained
from lora_lightning.data.decoding import LONGEST, is_strip, read_picture
from lora_lightning.data.findings import DataError
from lora_lightning.data.mask_pictures import Colour, class_colours, indexed, overlay
from lora_lightning.data.mask_transforms import evaluation_picture
from lora_lightning.data.picture_files import picture_files, problems_of_pictures
from lora_lightning.data.workers import loading_workers
from lora_lightning.errors import UserError
from lora_lightning.tasks.segmentation_maps import class_maps
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.plurals import counted
from lora_lightning.utils.progress import Bar
from lora_lightning.utils.tables import printable, truncate_list

MASKS, OVERLAYS, PIXELS, NAMES = "masks", "overlays", "pixels.csv", "classes.txt"
WIDEST = 1600  # pixels of an overlay
NEEDED = ("shorter_side", "mean", "std")
BATCH = 4


def problems(options: Mapping[str, Any], trained: Trained) -> list[str]:
    """What is wrong with the options, one line each, before anything is built."""
    out, found = Path(options["out"]), []
    if not options.get("overwrite") and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        found.append(f"out={out} is not empty: give another folder, or overwrite=true.")
    return found + problems_of_pictures(options.get("images"))


def predict(options: Mapping[str, Any], trained: Trained) -> str:
    """Give every pixel of each picture of a folder, or of one, a class.

    Writes `masks/`, PNG files of the pictures' sizes with a palette, whose indices are the classes;
    `overlays/`, the pictures with them; `pixels.csv`, the share of each class in each picture; `classes.txt`,
    the names of the indices, which data.class_names takes.

    Args:
        options: of the command `predict`, by name.

    Returns:
        What was done, in a few lines.
    """
    model, facts = trained.model(options.get("check_base", True))
    names = list(facts.get("class_names", ()))
    if not names:
        raise UserError("its data, which name the classes, are not on this machine: give recipe=NAME.")
    shown = facts if set(NEEDED) <= facts.keys() else _own_preprocessing(trained)
    pictures = Pictures(options["images"], shown["shorter_side"])
    flips = options.get("flips", trained.config["task"].get("test_flips", False))
    finder = Finder(model, trained, shown, flips)
    data = trained.config.get("data") or {}
    workers = options.get("num_workers", data.get("num_workers"))
    loader = DataLoader(
        pictures,
        options.get("batch_size", min(BATCH, data.get("batch_size", BATCH))),
        num_workers=0 if len(pictures) == 1 else loading_workers(workers, None),
        collate_fn=list,
    )
    writer = Writer(Path(options["out"]), pictures, names, facts.get("palette"))
    with Bar("predicting", len(pictures), "pictures") as bar:
        for batch in loader:
            good = [one for one in batch if isinstance(one[1], Tensor)]
            maps = finder([one[1] for one in good], [one[2] for one in good])
            for (index, _, _), found in zip(good, maps, strict=True):
                writer.add(index, found)
            for index, why, _ in (one for one in batch if isinstance(one[1], str)):
                writer.rows[index] = {"path": pictures.names[index], "error": why}
            bar.advance(len(batch))
    return printable("\n".join(writer.close()))


class Pictures(Dataset[Any]):
    """index -> (index, picture (3, height, width) of uint8 as evaluation resizes it, its full height and
    width); or (index, why the file cannot be read, None).

    Args:
        path: a file, or a folder.
        shorter_side: to which pictures are resized; None leaves them as they are.
    """

    def __init__(self, path: str | Path, shorter_side: int | None) -> None:
        self.files, self.names = picture_files(path)
        self.shorter_side = shorter_side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str, tuple[int, int] | None]:
        try:
            pixels = torch.from_numpy(np.array(read_picture(self.files[index]))).permute(2, 0, 1)
        except DataError as error:
            return index, str(error), None
        size = int(pixels.shape[1]), int(pixels.shape[2])
        if is_strip(*size):
            return index, f"{size[1]} x {size[0]} pixels: cut it to {LONGEST} times as long as wide.", None
        return index, evaluation_picture(pixels, self.shorter_side), size


class Finder:
    """A model on its device: pictures of uint8 -> maps (height, width) of classes on the CPU.

    Args:
        shown: mean and std of values in [0, 1] by which pictures are normalized.
        flips: the mean over each picture and its mirror image.
    """

    def __init__(self, model: nn.Module, trained: Trained, shown: Mapping[str, Any], flips: bool) -> None:
        self.fabric, self.flips = trained.fabric(), flips
        self.model = model.to(self.fabric.device)
        self.mean, self.std = (
            255 * torch.tensor(shown[name], device=self.fabric.device).view(3, 1, 1)
            for name in ("mean", "std")
        )

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        inputs = [(p.to(self.fabric.device).float() - self.mean) / self.std for p in pictures]
        with self.fabric.autocast():
            maps = class_maps(self.model, inputs, sizes, self.flips)
        return [one.cpu().numpy() for one in maps]


class Writer:
    """Writes masks and overlays as they come, and then the table.

    Args:
        out: the folder to write to.
        palette: of the classes, three numbers each; None takes colours that differ.
    """

    def __init__(
        self, out: Path, pictures: Pictures, names: Sequence[str], palette: Sequence[int] | None
    ) -> None:
        self.out, self.pictures, self.names = out, pictures, names
        self.colours: list[Colour] = class_colours(names, palette)
        self.rows: list[Row] = [{}] * len(pictures)
        twice = {name for name, count in Counter(["path", "error", *names]).items() if count > 1}
        self.columns = [f"{name} (class {i})" if name in twice else name for i, name in enumerate(names)]
        plain = [str(Path(name).with_suffix("")) for name in pictures.names]
        taken = Counter(plain)  # a.jpg beside a.png
        both = zip(plain, pictures.names, strict=True)
        self.stems = [stem if taken[stem] == 1 else name for stem, name in both]

    def add(self, index: int, found: np.ndarray) -> None:
        """The map (height, width) of one picture."""
        mask, laid = (self.out / folder / f"{self.stems[index]}.png" for folder in (MASKS, OVERLAYS))
        for file in (mask, laid):
            file.parent.mkdir(parents=True, exist_ok=True)
        indexed(found, self.colours).save(mask)
        picture = read_picture(self.pictures.files[index])
        overlay(picture, found, self.colours, min(picture.width, WIDEST)).save(laid)
        shares = np.bincount(found.reshape(-1), minlength=len(self.names)) / found.size
        columns = zip(self.columns, shares.tolist(), strict=True)
        self.rows[index] = {"path": self.pictures.names[index], **{n: round(s, 6) for n, s in columns}}

    def close(self) -> list[str]:
        """Write what is about all of them, and say in lines what was done."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_rows(self.out / PIXELS, ["path", *self.columns, "error"], self.rows)
        text = "".join(f"{name}\n" for name in self.names)
        write_whole(self.out / NAMES, lambda file: Path(file).write_text(text, encoding="utf-8"))
        bad = [row["path"] for row in self.rows if "error" in row]
        good = len(self.rows) - len(bad)
        lines = [f"{counted(good, 'picture')} predicted, of {len(self.names)} classes"]
        if bad:
            lines.append(f"{len(bad)} cannot be read: {truncate_list(bad)}")
        return [
            *lines,
            f"{self.out / MASKS}: a PNG for each, whose values are the classes",
            f"{self.out / OVERLAYS}: the pictures with them",
            f"{self.out / PIXELS}: the share of each class in each picture",
            f"{self.out / NAMES}: the classes from 0, for data.class_names",
        ]


def _own_preprocessing(trained: Trained) -> Mapping[str, Any]:
    raise UserError(
        f"{trained.where}: does not say how its pictures were shown to it (shorter_side, mean, std): give "
        "the adapter of a run of the training application."
    )
