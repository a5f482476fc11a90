"""What a page takes for granted as its reader's own: pictures, recordings, boxes. Its comments make them."""

from __future__ import annotations

from pathlib import Path

import speech_files

from tests.data.detection_sets import coco_content, write_coco
from tests.data.drawn import folders
from tests.data.mask_files import write_pairs


def photos(*names: str) -> None:
    """Folders of pictures, cats and dogs."""
    for name in names:
        folders(Path(name), {"cat": 12, "dog": 12})


def masked(*names: str) -> None:
    """Folders of pictures with masks."""
    for name in names:
        write_pairs(Path(name), 10)


def boxes(*parts: str) -> None:
    """`PART/` with pictures and `PART.json` with their boxes."""
    for number, part in enumerate(parts):
        write_coco(Path(part), Path(f"{part}.json"), coco_content(6, 50 * number))


def recordings(table: str, *others: str) -> None:
    """A table of recordings, and sound files beside it."""
    speech_files.manifest(Path(), speakers=1, each=12).rename(table)
    for name in others:
        speech_files.write(Path(name))
