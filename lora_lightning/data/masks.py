"""MasksDataModule: pictures and their masks, from two folders or a table, for semantic segmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lightning.data.decoding import read_picture
from lora_lightning.data.detection import tell
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.mask_check import (
    FileFindings,
    Pair,
    highest_class,
    known_codes,
    read_pairs,
    tell_unseen,
    without_doubles,
)
from lora_lightning.data.mask_files import Legend, numbered, palette_of, read_colours
from lora_lightning.data.mask_pairs import folder_pairs, split_parts, table_pairs
from lora_lightning.data.mask_sets import MaskedPictures, columns
from lora_lightning.data.mask_transforms import PRESETS, TrainingTransform
from lora_lightning.data.options import BatchSize, Folder, Seed, Workers
from lora_lightning.data.workers import loading_workers
from lora_lightning.errors import ConfigError, UserError
from lora_lightning.trainer.loader import ResumableLoader
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, Null, at_least, between, one_of, path

with loading("timm"):
    import timm.data

Part = Literal["train", "val", "test"]
SHARE = between(0, 1)
NAMES = Check(
    "a list of names, or a text file with one in each line",
    lambda v: (
        bool(v) and (isinstance(v, str) or (isinstance(v, Sequence) and all(isinstance(n, str) for n in v)))
    ),
)


class MasksDataModule(L.LightningDataModule):
    """Pictures with masks, PNG files whose values say the class of each pixel.

    Training batches are pictures (batch, 3, crop, crop), normalized as the model's data config says, masks
    (batch, crop, crop), uint8, in which 255 is no class, and the pictures' places in their part (batch,).
    Batches of evaluation are three lists, since pictures differ in size: pictures resized to `image_size`,
    masks as they are.

    Args:
        root: a folder with `images` and `masks` in it, each of them with or without train, val and test; or
            with train, val and test in it, each of them with both. None with a `table`.
        table: a CSV, TSV or Parquet file with the columns path, mask and perhaps split, in place of
            `root`.
        images, masks: the names of these folders.
        mask_suffix: what masks' names have behind their pictures': `_mask` where `a.jpg` has `a_mask.png`.
        class_names: of index 0 first: a list, or a text file with one in each line; None numbers the classes
            that the masks hold.
        colours: a YAML or JSON file, name -> `'#rrggbb'`, [red, green, blue] or a grey value (or several of
            them), for masks that are not numbered 0, 1, 2, …; the name `ignore` is no class.
        ignore_index: of pixels that are neither trained on nor scored; None where there are none.
        val_share, test_share: of the pairs that no folder and no column gives a part, drawn by the seed;
            test_share=1 tests on all of them.
        image_size: shorter side to which pictures are resized for evaluation, and from which training
            scales and cuts; None leaves them as they are.
        crop_size: height and width of a training picture.
        batch_size: pictures a batch and process.
        num_workers: loading processes; None takes the cores of this process, at most 8.
        seed: the split, and the order and augmentation of training pictures.
        augment: a key of `lora_lightning.data.mask_transforms.PRESETS`.
        strict: what is wrong with the files is an error; otherwise it is dropped and counted.

    Attributes:
        provides: num_classes, class_names, and palette, three numbers a class, where the files have one.
        findings: the table of what the check has found, after setup; an empty text if nothing.

    Raises:
        ConfigError: one line for each bad option.
    """

    def __init__(
        self,
        root: Folder | None = None,
        table: Annotated[str | None, path("a CSV, TSV or Parquet file")] = None,
        images: str = "images",
        masks: str = "masks",
        mask_suffix: Annotated[str, Check("a text", lambda v: isinstance(v, str))] = "",
        class_names: Annotated[Sequence[str] | str | None, NAMES, Null("numbers")] = None,
        colours: Annotated[str | None, path("a YAML or JSON file")] = None,
        ignore_index: Annotated[int | None, between(0, 65535), Null("none")] = 255,
        val_share: Annotated[float, SHARE] = 0.1,
        test_share: Annotated[float, SHARE] = 0.1,
        image_size: Annotated[int | None, at_least(16), Null("their own")] = 520,
        crop_size: Annotated[int, at_least(16)] = 480,
        batch_size: BatchSize = 8,
        num_workers: Workers = None,
        seed: Seed = 0,
        augment: Annotated[str | None, one_of(*PRESETS), Null("none")] = "scale",
        strict: bool = True,
    ) -> None:
        super().__init__()
        require(MasksDataModule, locals(), _apart(root, table, class_names, colours, val_share, test_share))
        self.root, self.table = (
            None if p is None else Path(p).expanduser().absolute() for p in (root, table)
        )
        self.images, self.masks, self.mask_suffix = images, masks, mask_suffix
        self.colours = None if colours is None else Path(colours).expanduser()
        self.named, self.ignore_index = class_names, ignore_index
        self.shares = val_share, test_share
        self.image_size, self.crop_size = image_size, crop_size
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.augment, self.strict = augment or "none", strict
        self.subject = f"the masks of {self.table or self.root}"
        self.findings = ""
        self._pairs: dict[str, list[Pair]] = {}
        self._legend = Legend((), {})
        self._palette: list[int] | None = None
        self._mean_std: tuple[list[float], list[float]] | None = None

    @property
    def provides(self) -> dict[str, Any]:
        try:
            self._read()
        except UserError:  # which `prepare_data` tells; what else is missing is told with it
            if self.named is None or isinstance(self.named, str):
                raise
        names = list(self._legend.names or self.named or ())
        facts = {"num_classes": len(names), "class_names": names}
        return facts | ({"palette": list(self._palette)} if self._palette else {})

    def preprocessing(self) -> dict[str, Any]:
        """What evaluation does to a picture, in plain facts: `shorter_side` in pixels, and the mean and
        std of values in [0, 1] by which it is normalized."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if module is not None or self._mean_std is None:  # without a Trainer the last model's
            modules = [] if module is None else module.modules()
            model = next((m for m in modules if getattr(m, "pretrained_cfg", None)), nn.Identity())
            config = timm.data.resolve_data_config({}, model=model)  # ImageNet's where the model has none
            self._mean_std = list(config["mean"]), list(config["std"])
        mean, std = self._mean_std
        return {"shorter_side": self.image_size, "mean": mean, "std": std}

    def prepare_data(self) -> None:
        self._read()
        if self.findings:
            tell(f"{self.subject}:\n\n{self.findings}\n")

    def setup(self, stage: str | None = None) -> None:
        self._read()

    def show(self, part: Part, index: int) -> tuple[str, Image.Image]:
        """The name of a picture, and the picture as it is on the disk, upright and in RGB."""
        file = self.pairs(part)[index].picture
        base = self.root or (self.table.parent if self.table else file.parent)
        return (str(file.relative_to(base)) if file.is_relative_to(base) else str(file)), read_picture(file)

    def pairs(self, part: Part) -> list[Pair]:
        """The pictures and masks of a part."""
        self._read()
        return self._pairs[part]

    @property
    def test_set(self) -> MaskedPictures:
        """The test part, as evaluation has it."""
        return MaskedPictures(self.pairs("test"), self._legend, None, self.image_size)

    def train_dataloader(self) -> DataLoader:
        pairs = self.pairs("train")
        processes = 1 if self.trainer is None else self.trainer.world_size
        if (each := len(pairs) // processes) < self.batch_size:
            raise ConfigError([
                f"batch_size={self.batch_size}: {each} training pictures a process do not fill one batch; "
                f"give {max(1, each)}."
            ])  # fmt: skip
        training = TrainingTransform(self.augment, self.image_size, self.crop_size)
        pictures = MaskedPictures(pairs, self._legend, training)
        return self._loader(pictures, ResumableLoader, shuffle=True, drop_last=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        pictures, masks, places = batch
        return self.finish(pictures), masks, places

    def finish(self, pictures: Tensor | list[Tensor]) -> Any:
        """Normalized pictures of the precision in use, from uint8."""
        if not isinstance(pictures, Tensor):
            return [self.finish(picture) for picture in pictures]
        facts = self.preprocessing()
        mean, std = (
            255 * pictures.new_tensor(facts[k], dtype=torch.float32).view(3, 1, 1) for k in ("mean", "std")
        )
        pictures = pictures.float().sub_(mean).div_(std)
        return pictures if self.trainer is None else self.trainer.precision_plugin.convert_input(pictures)

    def _read(self) -> None:
        if self._pairs:
            return
        base = self.root or self.table.parent  # type: ignore[union-attr]  # one of the two is given
        findings = FileFindings(self.subject, base)
        legend, palette = read_colours(self.colours) if self.colours else (None, None)
        if self.table:
            files = table_pairs(self.table, findings)
        else:
            assert self.root is not None
            files = folder_pairs(self.root, self.images, self.masks, self.mask_suffix, findings)
        pairs = read_pairs(files, bool(legend and legend.coloured), findings)
        if legend is None:
            legend = self._numbered(pairs, findings)
        pairs, contents = without_doubles(known_codes(pairs, legend, findings), findings)
        pairs = split_parts(pairs, *self.shares, self.seed, lambda pair: contents[pair.picture])
        if pairs["train"]:
            tell_unseen(pairs["train"], legend, findings)
        self.findings = findings.settle(self.strict)
        needed = ("test",) if self.shares[1] == 1 else ("train", "val")
        if gone := [part for part in needed if not pairs[part]]:
            told = f"{self.subject}: no pair is left for {' and for '.join(gone)}.\n\n{self.findings}"
            raise DataError(told.rstrip())
        self._pairs, self._legend = pairs, legend
        first = next(pair for part in ("train", "test") for pair in pairs[part])
        self._palette = palette or palette_of(first.mask, len(legend.names))

    def _numbered(self, pairs: dict[str, list[Pair]], findings: Findings) -> Legend:
        names = self._names()
        if names is None:
            if findings and not any(pairs.values()):
                findings.settle(True)  # nothing can be counted, and the table says why
            highest = highest_class(pairs, self.ignore_index, self.subject)
            names = [str(number) for number in range(highest + 1)]
        return numbered(names, self.ignore_index)

    def _names(self) -> list[str] | None:
        if not isinstance(self.named, str):
            return None if self.named is None else list(self.named)
        file = Path(self.named).expanduser()
        try:
            names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(
                f"class_names={self.named}: cannot be read ({error}). Give a file with a class a line."
            ) from None
        return names

    def _evaluation(self, part: Part) -> DataLoader:
        return self._loader(
            MaskedPictures(self.pairs(part), self._legend, None, self.image_size), collate_fn=columns
        )

    def _loader(
        self, pictures: MaskedPictures, make: Callable[..., DataLoader] = DataLoader, **options: Any
    ) -> DataLoader:
        workers = loading_workers(self.num_workers, self.trainer)
        return make(
            pictures,
            batch_size=self.batch_size,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            **options,
        )


def _apart(
    root: Any, table: Any, class_names: Any, colours: Any, val_share: Any, test_share: Any
) -> list[str]:
    """What is wrong in options taken together."""
    found = []
    places = [p for p in (root, table) if p is not None]
    if len(places) != 1 and all(isinstance(p, str) for p in places):
        found.append("root and table: give one of the two, a folder or a table of files.")
    if class_names is not None and isinstance(colours, str):
        found.append("class_names: colours=FILE names the classes, too; give one of the two.")
    shares = val_share, test_share
    if all(isinstance(s, (int, float)) for s in shares) and sum(shares) >= 1 and test_share != 1:
        found.append(
            f"test_share={test_share}: nothing is left to train on beside val_share={val_share}: "
            "give shares that are below 1 together."
        )
    return found
