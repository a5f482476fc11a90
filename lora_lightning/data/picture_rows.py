"""PictureRow: one picture of the user's with its label, as a folder or a table lists it; how folders do."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_lightning.data.decoding import SUFFIXES
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.errors import MissingFileError, did_you_mean
from lora_lightning.utils.tables import truncate_list

PART_NAMES = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "tst": "test",
}  # fmt: skip
SYSTEM = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "__pycache__")  # folders
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r")
FOREIGN = {  # what cameras write, and PIL does not read
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"), "a raw format"),
}  # fmt: skip
TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class PictureRow:
    """A picture as it is listed.

    Attributes:
        file: where it is.
        name: by which a person finds it, relative to the folder of the data.
        labels: its classes, or its number as a text.
        part: "train", "val" or "test", or empty where the listing does not say.
        group: of which no two parts may have pictures; empty where there is none.
        weight: of its loss.
    """

    file: str
    name: str
    labels: tuple[str, ...]
    part: str = ""
    group: str = ""
    weight: float = 1.0


def folder_rows(root: Path, findings: Findings) -> list[PictureRow]:
    """The pictures of a folder with a folder for each class, or with such folders in train, val and test.

    Folders within a class folder belong to it; links are followed. Hidden files, and what systems leave
    behind, are passed over in silence.

    Raises:
        MissingFileError: there is no such folder.
        DataError: it holds no folders with pictures.
    """
    if not root.is_dir():
        beside = [p.name for p in root.parent.glob("*/")] if root.parent.is_dir() else []
        what = "is a file" if root.is_file() else "does not exist"
        table = f" Give data.table={root} for a table." if root.suffix.lower() in TABLES else ""
        raise MissingFileError(
            f"root={root}: {what}.{did_you_mean(root.name, beside)}{table} Give data.root=FOLDER, a folder "
            "that has a folder of pictures for each class."
        )
    inside = _folders(root)
    parts = {
        folder: PART_NAMES[folder.name.lower()] for folder in inside if folder.name.lower() in PART_NAMES
    }
    if "train" not in parts.values():
        parts = {}
    places = parts or {root: ""}
    for folder in inside if parts else ():
        if folder not in parts:
            findings.add(f"folder beside {truncate_list(_names(parts))}", f"{folder.name}/", "left out", True)
    rows = [row for folder, part in places.items() for row in _class_rows(root, folder, part, findings)]
    if not rows:
        raise DataError(_no_pictures(root, inside))
    return rows


def _class_rows(root: Path, folder: Path, part: str, findings: Findings) -> Iterator[PictureRow]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() or passed_over(entry.name):
            continue
        if entry.suffix.lower() in SUFFIXES:
            findings.add("picture in no class's folder", _relative(entry, root), "left out")
        elif entry.suffix.lower() not in TABLES:
            _tell_other(entry, root, findings)
    for place in _folders(folder):
        files = list(_pictures(place, root, findings))
        if not files:
            findings.add("class folder without a picture", f"{_relative(place, root)}/", "left out", True)
        label = text_of(place.name)
        yield from (PictureRow(str(file), _relative(file, root), (label,), part) for file in files)


def _pictures(folder: Path, root: Path, findings: Findings) -> Iterator[Path]:
    """Every file with a picture's name below a folder, in order; each folder once, whatever leads to it."""
    seen: set[str] = set()

    def closed(error: OSError) -> None:
        findings.add("folder that cannot be opened", f"{error.filename}: {error.strerror}", "left out")

    for place, inner, files in os.walk(folder, onerror=closed, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not passed_over(name))
        for name in sorted(files):
            file = Path(place, name)
            if passed_over(name):
                continue
            if file.suffix.lower() not in SUFFIXES:
                _tell_other(file, root, findings)
            elif file.is_symlink() and not file.exists():
                findings.add("link that leads nowhere", _relative(file, root), "left out")
            else:
                yield file


def _tell_other(file: Path, root: Path, findings: Findings) -> None:
    suffix = file.suffix.lower()
    where = _relative(file, root)
    if form := FOREIGN.get(suffix):
        findings.add(f"picture in {form}, which cannot be read", where, "left out: make it JPEG")
    else:
        findings.add(f"other file ({suffix or 'no suffix'})", where, "left out", harmless=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not passed_over(p.name))


def passed_over(name: str) -> bool:
    """Whether a file or folder is hidden, or what a system leaves behind, such as `Thumbs.db`."""
    low = name.lower()
    return low.startswith(".") or low in SYSTEM or low in SYSTEM_FILES


def _names(folders: dict[Path, str]) -> list[str]:
    return [folder.name for folder in folders]


def _relative(file: Path, root: Path) -> str:
    return text_of(file.relative_to(root).as_posix())


def text_of(name: str) -> str:
    """A file's name as text that can be written and compared: in composed form, as no macOS has it, and with
    marks for bytes that are no text."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "replace"))


def _no_pictures(root: Path, inside: list[Path]) -> str:
    """What a folder holds in place of classes' folders, and what may be meant."""
    flat = [p for p in root.iterdir() if p.suffix.lower() in SUFFIXES]
    tables = [p for p in root.iterdir() if p.suffix.lower() in TABLES and p.is_file()]
    found = f"{len(flat):,} pictures, but no folders" if flat else "no folder with pictures"
    hints = [f"give data.table={table} where it says their labels" for table in tables[:1]]
    if not flat and (lower := [p for p in inside if any(_folders(p))]):
        hints.append(f"give data.root={lower[0]} where that is meant")
    tail = f"; or {', or '.join(hints)}" if hints else ""
    return (
        f"root={root}: holds {found}. Put the pictures of each class into a folder of its name ({root.name}"
        f"/cat/1.jpg, {root.name}/dog/2.jpg), or list them in a table (data.table=FILE.csv){tail}."
    )
