"""NamedSetDataModule: published picture sets by name, in the folders that torchvision makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from lora_lightning.data.named_files import NAMED, fetch_set, require_set
from lora_lightning.data.options import Folder
from lora_lightning.data.picture_sets import PicturePart, PictureSet, stratified_split
from lora_lightning.data.pictures import Part, PictureDataModule
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.utils.checks import options_of, require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import above

SetName = Literal[
    "cifar10", "cifar100", "fashion_mnist", "flowers102", "pets", "food101", "eurosat", "stanford_cars",
    "imagenet",
]  # fmt: skip


class NamedSetDataModule(PictureDataModule):
    """A published set of pictures, split as its authors did.

    CIFAR-10 and CIFAR-100 (Krizhevsky 2009), Fashion-MNIST (Xiao et al. 2017), Oxford Flowers-102
    (Nilsback and Zisserman 2008), Oxford-IIIT Pets (Parkhi et al. 2012), Food-101 (Bossard et al. 2014),
    EuroSAT (Helber et al. 2019), Stanford Cars (Krause et al. 2013), ImageNet (Russakovsky et al. 2015).
    EuroSAT has no split: a fifth, of each class alike, is for testing once and for all. ImageNet is tested
    on its validation pictures. Of sets without a validation part, part of the training pictures is set aside.

    Args:
        name: which set.
        root: the folder that holds the set's own folder.
        download: fetch the set into `root`, or unpack its archives there, if it is not there.
        val_share: the share of the training pictures, of each class alike, set aside for validation.
        **options: of `PictureDataModule`; without `augment` and `crop_pct`, what suits the set.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: the set is not there, not whole, or cannot be downloaded.
    """

    @options_of(PictureDataModule)
    def __init__(
        self,
        name: SetName = "cifar10",
        root: Folder = "data",
        download: bool = False,
        val_share: Annotated[float, above(0, below=1)] = 0.1,
        **options: Any,
    ) -> None:
        require(NamedSetDataModule, {**locals(), **options})
        if options.get("augment") is None:
            options["augment"] = NAMED[name].augment
        super().__init__(**{"crop_pct": NAMED[name].crop_pct, **options})
        self.named = name
        self.root = Path(root).expanduser().absolute()
        self.download, self.val_share = download, val_share
        self._checked = False
        self._whole: PictureSet | None = None  # the training pictures before some are set aside

    @property
    def provides(self) -> dict[str, Any]:
        try:
            return super().provides
        except MissingFileError:  # `prepare_data` tells; a model that is missing too is then told with it
            return {"target": self.target, "num_classes": NAMED[self.named].classes}

    def prepare_data(self) -> None:
        if self.download:
            fetch_set(self.named, self.root)
        self._require()

    def _require(self) -> None:
        if not self._checked:
            if needed := NAMED[self.named].needs:
                with loading(needed, "recipes"):
                    __import__(needed)
            require_set(self.named, self.root)
            self._checked = True

    def read(self, part: Part) -> PictureSet:
        self._require()
        if part == "test" or NAMED[self.named].own_val:
            return self._read(part)
        if self._whole is None:
            self._whole = self._read("train")
        held = round(self.val_share * len(self._whole))
        if not 0 < held < len(self._whole):
            told = f"val_share={self.val_share}: of {len(self._whole)} training pictures that is {held}"
            raise ConfigError([f"{told}; give another, so that some are left on both sides."])
        train, val = stratified_split(self._whole.targets, held, self.seed)
        return PicturePart(self._whole, train if part == "train" else val)

    def _read(self, part: Part) -> PictureSet:
        pictures, self.class_names = NAMED[self.named].read(self.root, part)
        return pictures
