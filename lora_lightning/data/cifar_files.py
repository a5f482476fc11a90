"""The files of CIFAR-10 and CIFAR-100: found, checked against the official md5, downloaded."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.errors import MissingFileError
from lora_lightning.utils.download import failure_text, url_failure
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity


def bad_files(dataset: type[CIFAR10], root: Path) -> list[str]:
    """The files under `root` that are missing or damaged; the others carry the official md5."""
    folder = root / dataset.base_folder
    meta = [dataset.meta["filename"], dataset.meta["md5"]]
    return [
        f"{name} (damaged: wrong md5)" if (folder / name).is_file() else name
        for name, md5 in [*dataset.train_list, *dataset.test_list, meta]
        if not check_integrity(str(folder / name), md5)
    ]


def require_files(dataset: type[CIFAR10], root: Path) -> None:
    """Nothing if every file is there and whole.

    Raises:
        MissingFileError: which are not, where they belong, how to get them.
    """
    if bad := bad_files(dataset, root):
        raise MissingFileError(_message(dataset, root, bad, "is not on this machine"))


def download_files(dataset: type[CIFAR10], root: Path) -> None:
    """Fetch and unpack the archive; one that already lies in `root` is only unpacked.

    Raises:
        MissingFileError: it cannot be had now; a server that does not answer is not waited for.
    """
    reason = None
    if not check_integrity(str(root / dataset.filename), dataset.tgz_md5):
        reason = url_failure(dataset.url)
    if reason is None:
        try:
            dataset(str(root), download=True)
            return
        except (OSError, RuntimeError) as error:  # no space, cut off, or not the official archive
            reason = failure_text(error)
    what = f"cannot be downloaded now ({reason})"
    raise MissingFileError(_message(dataset, root, bad_files(dataset, root), what))


def _message(dataset: type[CIFAR10], root: Path, bad: list[str], what: str) -> str:
    name = {"CIFAR10": "CIFAR-10", "CIFAR100": "CIFAR-100"}[dataset.__name__]
    folder = root / dataset.base_folder
    hint = ""
    if root.name == dataset.base_folder:
        hint = f"\n  near miss:  data.root={root.parent} (the folder above)"
    return (
        f"{name} {what}.\n"
        f"  files:      {', '.join(bad)}\n"
        f"  looked for: {folder}{hint}\n"
        f"  to get it:  data.download=true fetches it (about 170 MB); data.root=FOLDER if "
        f"{dataset.base_folder}\n"
        f"              lies in another folder; by hand, get {dataset.url}\n"
        f"              and unpack it: tar xzf {dataset.filename} -C {root}"
    )
