"""What a page takes for granted as its reader's own: pictures, recordings, boxes. Its comments make them."""

from __future__ import annotations

from pathlib import Path

import speech_files

from tests.data.detection_sets import coco_content, write_coco
from tests.data.drawn import folders, photo
from tests.data.mask_files import drawn, save_mask, write_pairs


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


def faulty_photos(name: str) -> None:
    """A folder of discs and squares with what may be wrong in one."""
    root = folders(Path(name), {"disc": 9, "square": 9})
    disc, square = root / "disc", root / "square"
    (root / "loose.png").write_bytes((disc / "1.png").read_bytes())
    (disc / "half.png").write_bytes((disc / "0.png").read_bytes()[:-30])
    (square / "disc.png").write_bytes((disc / "2.png").read_bytes())
    (square / "again.png").write_bytes((square / "1.png").read_bytes())
    photo("disc", 5001).convert("CMYK").save(disc / "print.tif")
    (root / "Disc").mkdir()
    photo("disc", 5000).save(root / "Disc" / "0.png")
    (root / "nothing").mkdir()


def faulty_masks(name: str) -> None:
    """Pictures and masks, of which five pairs are wrong."""
    root = write_pairs(Path(name), 10)
    (root / "masks" / "000.png").unlink()
    (root / "images" / "001.png").unlink()
    save_mask(drawn(2)[1], root / "masks" / "002.png")  # lies, where its picture stands
    (root / "masks" / "003.png").write_bytes(b"no picture")
    unknown = drawn(5)[1]
    unknown[5, 5:9] = 9
    save_mask(unknown, root / "masks" / "005.png")


def faulty_boxes(part: str) -> None:
    """`PART/` with pictures and `PART.json` with five boxes that are wrong."""
    content = coco_content(6)
    changes = (
        {"bbox": [200, 10, 20, 20]},
        {"bbox": [80, 10, 40, 20]},
        {},
        {"bbox": [10, 10, 5]},
        {"bbox": [10, 10, 5, float("nan")]},
        {"category_id": 99},
    )
    for annotation, change in zip(content["annotations"], changes):
        annotation |= change
    write_coco(Path(part), Path(f"{part}.json"), content)


def words(model: str, lexicon: str) -> None:
    """A language model of one word, and the words that the recordings have."""
    lines = [
        "\\data\\",
        "ngram 1=4",
        "",
        "\\1-grams:",
        "-1\t<unk>",
        "-99\t<s>",
        "-0.7\t</s>",
        "-0.5\tred",
        "",
        "\\end\\",
    ]
    Path(model).write_text("\n".join(lines), encoding="utf-8")
    Path(lexicon).write_text("\n".join(speech_files.WORDS), encoding="utf-8")
