"""Named picture sets: where each lies, whether it is all there, and the one message where it is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_lightning.data import named_arrays as arrays
from lora_lightning.data import named_folders as folders
from lora_lightning.data.named_arrays import Part, Read
from lora_lightning.data.torchvision_downloads import our_bar
from lora_lightning.errors import MissingFileError
from lora_lightning.utils.download import failure_text, url_failure
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.datasets import (
        CIFAR10,
        CIFAR100,
        EuroSAT,
        FashionMNIST,
        Flowers102,
        Food101,
        ImageNet,
        OxfordIIITPet,
    )

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
# ImageNet's crops from 0.08 on would cut scraps of a few pixels out of a picture of 32.
SMALL = {"crop_scale": (0.7, 1.0), "mixup": 0.8, "cutmix": 1.0}
ILSVRC = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


@dataclass(frozen=True)
class NamedSet:
    """A published set of pictures.

    Args:
        title: its name.
        classes: how many it has.
        place: its folder below the root, as torchvision unpacks it; "" is the root itself.
        missing: root -> which files are missing or damaged.
        read: (root, part) -> pictures and the names of the classes.
        url: of one of its files, asked for before anything is downloaded; None where it cannot be had.
        archives: its packed files, below the root. Where all are there nobody is asked.
        size: of what is downloaded.
        fetch: downloads and unpacks it into a root; None where nothing can.
        by_hand: how to get it without `download`; {root} and {folder} are filled in.
        own_val: it has a validation part of its own.
        augment: of its training pictures, where nothing else is asked for.
        crop_pct: share of the shorter side that evaluation keeps; None takes the model's.
        needs: a package that reading it takes, beside those for pictures.
    """

    title: str
    classes: int
    place: str
    missing: Callable[[Path], list[str]]
    read: Callable[[Path, Part], Read]
    url: str | None
    archives: tuple[str, ...]
    size: str
    fetch: Callable[[str], object] | None
    by_hand: tuple[str, ...]
    own_val: bool = False
    augment: Mapping[str, Any] = field(default_factory=dict)
    crop_pct: float | None = None
    needs: str | None = None


def _cifar(dataset: Any, title: str, classes: int) -> NamedSet:
    return NamedSet(
        title,
        classes,
        dataset.base_folder,
        partial(arrays.cifar_missing, dataset),
        partial(arrays.cifar_read, dataset),
        dataset.url,
        (dataset.filename,),
        "170 MB",
        partial(dataset, download=True),
        (f"get {dataset.url}", f"and unpack it: tar xzf {dataset.filename} -C {{root}}"),
        augment=SMALL,
        crop_pct=1.0,  # the object fills the picture
    )


def _unpack_imagenet(root: str) -> None:
    for split in ("train", "val"):
        ImageNet(root, split)


NAMED: dict[str, NamedSet] = {
    "cifar10": _cifar(CIFAR10, "CIFAR-10", 10),
    "cifar100": _cifar(CIFAR100, "CIFAR-100", 100),
    "fashion_mnist": NamedSet(
        "Fashion-MNIST",
        10,
        "FashionMNIST/raw",
        arrays.fashion_missing,
        arrays.fashion_read,
        FashionMNIST.mirrors[0] + FashionMNIST.resources[0][0],
        tuple(f"FashionMNIST/raw/{file}" for file, _ in FashionMNIST.resources),
        "31 MB",
        partial(FashionMNIST, download=True),
        (
            "Debian's package dataset-fashion-mnist has it, or get the four files of",
            f"{FashionMNIST.mirrors[0]} into {{root}}, packed as they are",
        ),
        augment=SMALL,
        crop_pct=1.0,
    ),
    "flowers102": NamedSet(
        "Oxford Flowers-102",
        102,
        "flowers-102",
        folders.flowers_missing,
        folders.flowers_read,
        f"{OXFORD}/flowers/102/102flowers.tgz",
        tuple(f"flowers-102/{file}" for file, _ in Flowers102._file_dict.values()),
        "345 MB",
        partial(Flowers102, download=True),
        (
            f"get 102flowers.tgz, imagelabels.mat and setid.mat from {OXFORD}/flowers/102/",
            "into {folder} and unpack the first: tar xzf 102flowers.tgz",
        ),
        own_val=True,
        needs="scipy",
    ),
    "pets": NamedSet(
        "Oxford-IIIT Pets",
        37,
        "oxford-iiit-pet",
        folders.pets_missing,
        folders.pets_read,
        OxfordIIITPet._RESOURCES[0][0],
        ("oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"),
        "810 MB",
        partial(OxfordIIITPet, download=True),
        (f"get images.tar.gz and annotations.tar.gz from {OXFORD}/pets/data/", "and unpack both in {folder}"),
    ),
    "food101": NamedSet(
        "Food-101",
        101,
        "food-101",
        folders.food_missing,
        folders.food_read,
        Food101._URL,
        ("food-101.tar.gz",),
        "5 GB",
        partial(Food101, download=True),
        (f"get {Food101._URL}", "and unpack it: tar xzf food-101.tar.gz -C {root}"),
    ),
    "eurosat": NamedSet(
        "EuroSAT",
        10,
        "eurosat/2750",
        folders.eurosat_missing,
        folders.eurosat_read,
        "https://huggingface.co/datasets/torchgeo/eurosat",
        ("eurosat/EuroSAT.zip",),
        "94 MB",
        partial(EuroSAT, download=True),
        (
            "get EuroSAT.zip from https://zenodo.org/records/7711810",
            "and unpack it: unzip EuroSAT.zip -d {root}/eurosat",
        ),
        crop_pct=1.0,
    ),
    "stanford_cars": NamedSet(
        "Stanford Cars",
        196,
        "stanford_cars",
        folders.cars_missing,
        folders.cars_read,
        None,
        (),
        "1.9 GB",
        None,
        (
            "its own address is gone; https://github.com/pytorch/vision/issues/7545 says where copies",
            "are, such as https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset, and",
            "how the folders are called",
        ),
        needs="scipy",
    ),
    "imagenet": NamedSet(
        "ImageNet (ILSVRC 2012)",
        1000,
        "",
        folders.imagenet_missing,
        folders.imagenet_read,
        None,
        ILSVRC,
        "155 GB",
        _unpack_imagenet,
        (
            f"register at https://image-net.org, get {ILSVRC[0]},",
            f"{ILSVRC[1]} and {ILSVRC[2]} into",
            "{root}; data.download=true then unpacks them",
        ),
        needs="scipy",
    ),
}


def require_set(name: str, root: Path) -> None:
    """Nothing if every file of a set is there and whole.

    Raises:
        MissingFileError: which are not, where they were looked for, how to get them.
    """
    if bad := NAMED[name].missing(root):
        raise MissingFileError(_message(NAMED[name], root, bad, "is not on this machine"))


def fetch_set(name: str, root: Path) -> None:
    """Download and unpack a set; archives that already lie there are only unpacked.

    Raises:
        MissingFileError: it cannot be had now; a server that does not answer is not waited for.
    """
    one = NAMED[name]
    bad = one.missing(root)
    if not bad:
        return
    here = bool(one.archives) and all((root / file).is_file() for file in one.archives)
    if one.fetch is None or (one.url is None and not here):
        raise MissingFileError(_message(one, root, bad, "cannot be downloaded"))
    reason = None if here or one.url is None else url_failure(one.url)
    if reason is None:
        try:
            with our_bar():
                one.fetch(str(root))
        except (OSError, RuntimeError, ImportError) as error:  # no space, cut off, not the official archive
            reason = failure_text(error)
    if reason is not None:
        told = f"cannot be {'unpacked' if here else 'downloaded'} now ({reason})"
        raise MissingFileError(_message(one, root, one.missing(root), told))


def _message(one: NamedSet, root: Path, bad: list[str], what: str) -> str:
    folder = root / one.place if one.place else root
    name = one.place.partition("/")[0]
    near = [f"data.root={place}" for place in _near(root, name)] if name else []
    hint = [f"  near miss:  {' or '.join(near)}"] if near else []
    ways = (
        [] if one.fetch is None or one.url is None else [f"data.download=true fetches it (about {one.size});"]
    )
    ways += [f"data.root=FOLDER if {name or 'train and val'} {'lies' if name else 'lie'} in another folder;"]
    by_hand = (f"by hand, {one.by_hand[0]}", *one.by_hand[1:])
    ways += [line.format(root=root, folder=folder) for line in by_hand]
    return "\n".join(
        [
            f"{one.title} {what}.",
            f"  files:      {', '.join(bad)}",
            f"  looked for: {folder}",
            *hint,
            f"  to get it:  {ways[0]}",
            *(f"              {way}" for way in ways[1:]),
        ]
    )


def _near(root: Path, name: str) -> list[Path]:
    """Folders near the root in which the set's own folder lies."""
    above = [root.parent, *root.parents[1:3]]
    below = [f for f in sorted(root.iterdir()) if f.is_dir()][:50] if root.is_dir() else []
    return [place for place in (*above, *below) if (place / name).is_dir()][:1]
