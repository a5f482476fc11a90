"""Masks as files: which value of a pixel means which class, and what is wrong with a file."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_lightning.data.findings import DataError
from lora_lightning.utils.mapping_file import read_mapping

IGNORED, UNKNOWN = 255, 254  # in a mask as it is trained on: pixels of no class
MOST_CLASSES = UNKNOWN
MOST_VALUES = 4096  # in one file: a photograph has more
IGNORE = "ignore"  # the name of no class in a file of colours
REMEDY = "Give a YAML file with a line for each class, such as `road: '#804080'`, or `road: 7` of grey masks."
HEX = re.compile(r"#?([0-9a-fA-F]{6})")


@dataclass(frozen=True)
class Legend:
    """Which code in a mask's file is which class.

    A code is the index of a palette's entry or the grey value; of masks in colours red·2¹⁶ + green·2⁸ + blue.

    Attributes:
        names: of the classes.
        classes: code -> class, or IGNORED.
        coloured: whether the codes are colours.
    """

    names: tuple[str, ...]
    classes: Mapping[int, int]
    coloured: bool = False

    @functools.cached_property
    def table(self) -> np.ndarray:
        """(codes,), uint8: the class of each code."""
        table = np.full(2**24 if self.coloured else 2**16, UNKNOWN, np.uint8)
        table[list(self.classes)] = list(self.classes.values())
        return table

    def read(self, file: Path) -> np.ndarray:
        """A mask (height, width) of class indices, uint8; IGNORED where the code is that of no class.

        Raises:
            DataError: it cannot be read.
        """
        mask = self.table[codes_of(file, self.coloured)]
        mask[mask == UNKNOWN] = IGNORED
        return mask


def numbered(names: Sequence[str], ignore_index: int | None) -> Legend:
    """Classes that are numbered from 0 in the files."""
    classes = {n: n for n in range(len(names))}
    return Legend(tuple(names), classes if ignore_index is None else {**classes, ignore_index: IGNORED})


def codes_of(file: Path, coloured: bool) -> np.ndarray:
    """The codes of a mask's pixels (height, width), whole numbers.

    Raises:
        DataError: it cannot be read; or it is in colours and `coloured` is false.
    """
    try:
        with Image.open(file, formats=["PNG", "TIFF", "BMP", "GIF", "WEBP"]) as image:
            if coloured:
                pixels = np.asarray(image.convert("RGB"), np.uint32)
                return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
            if image.mode == "1":
                return np.asarray(image, np.uint8)
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{file} cannot be read as a mask ({reason}). Make it anew, as PNG.") from None
    if pixels.ndim == 3:
        pixels = _grey(pixels, file)
    if pixels.dtype.kind not in "iu" or (pixels.size and not 0 <= pixels.min() <= pixels.max() < 2**16):
        raise DataError(
            f"{file} cannot be read as a mask (its values are no whole numbers up to 65535). Make it "
            "anew, as PNG."
        )
    return pixels


def _grey(pixels: np.ndarray, file: Path) -> np.ndarray:
    """Grey values that were saved with an alpha channel, or three times."""
    colours = pixels[..., :1] if pixels.shape[2] < 3 else pixels[..., :3]
    if (colours != colours[..., :1]).any():
        raise DataError(f"{file}: is in colours: give data.colours=FILE, which says which is which class.")
    return colours[..., 0]


def count_codes(codes: np.ndarray) -> dict[int, int] | None:
    """How many pixels each code has; None where there are more codes than a mask can have."""
    if codes.dtype.itemsize <= 2 or codes.max(initial=0) < 2**16:
        each = np.bincount(codes.reshape(-1))
        found = np.flatnonzero(each)
        counts = each[found]
    else:
        found, counts = np.unique(codes, return_counts=True)
    if len(found) > MOST_VALUES:
        return None
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def palette_of(file: Path, count: int) -> list[int] | None:
    """Red, green and blue of the first `count` entries of a PNG's palette, one after the other; None where it
    has none, or no colours."""
    with Image.open(file) as image:
        palette = image.getpalette() if image.mode == "P" else None
    if (
        palette is None
        or len(palette) < 3 * count
        or len({*map(tuple, _threes(palette[: 3 * count]))}) < count
    ):
        return None
    return palette[: 3 * count]


def _threes(values: Sequence[int]) -> list[Sequence[int]]:
    return [values[i : i + 3] for i in range(0, len(values), 3)]


def read_colours(file: Path) -> tuple[Legend, list[int] | None]:
    """The classes that a file of colours names, in its order, and their colours, three numbers each; None of
    grey values.

    Raises:
        AdapterFileError: it cannot be read.
        DataError: something else than a colour or a grey value stands behind a name.
    """
    classes: dict[int, int] = {}
    names: list[str] = []
    palette: list[int] = []
    kinds = set()
    given = read_mapping(file, REMEDY)
    for name, value in given.items():
        several = isinstance(value, list) and not all(_is_byte(v) for v in value)
        for one in value if several else [value]:
            code, coloured = _code(name, one, file)
            kinds.add(coloured)
            if code in classes:
                raise DataError(f"{file}: {name}: {one} is the value of another name, too. {REMEDY}")
            classes[code] = IGNORED if name == IGNORE else len(names)
        if name != IGNORE:
            names.append(str(name))
            palette += [code >> 16, code >> 8 & 255, code & 255]
    if not names or len(names) > MOST_CLASSES:
        raise DataError(f"{file} names {len(names)} classes; there may be 1 to {MOST_CLASSES}. {REMEDY}")
    if len(kinds) > 1:
        raise DataError(f"{file} has colours and grey values; masks are read as one of the two. {REMEDY}")
    coloured = kinds == {True}
    return Legend(tuple(names), classes, coloured), palette if coloured else None


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _code(name: Any, value: Any, file: Path) -> tuple[int, bool]:
    """A colour or grey value as a code, and whether it is a colour."""
    if type(value) is int and 0 <= value < 2**16:
        return value, False
    if isinstance(value, str) and (found := HEX.fullmatch(value.strip())):
        return int(found[1], 16), True
    if isinstance(value, list) and len(value) == 3 and all(map(_is_byte, value)):
        red, green, blue = value
        return red << 16 | green << 8 | blue, True
    raise DataError(
        f"{file}: {name}={value!r}: give '#rrggbb', [red, green, blue] of 0 to 255, or the grey value. "
        f"{REMEDY}"
    )
