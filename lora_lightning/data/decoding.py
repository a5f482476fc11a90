"""Pictures decoded: any file of one as RGB of 8 bits, and what is wrong or unusual about it.

Whole data sets are checked in `data/picture_check.py`; what a model is shown is made in
`data/picture_transform.py`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lora_lightning.data.findings import DataError

Enough = Callable[[int, int], int]  # upright width and height -> pixels of the shorter side that are enough
File = str | os.PathLike[str] | bytes
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".ico",
)  # fmt: skip
MOST_PIXELS = 2 * 89_478_485  # PIL refuses more; a phone's largest photographs have 200 million or fewer
HUGE = 50_000_000  # pixels, from which on decoding takes seconds
TINY = 16  # pixels of the shorter side, below which there is little to see
ROTATED = 0x0112  # EXIF's tag of the orientation
TURNS: dict[object, Image.Transpose] = {  # by its value, as PIL's exif_transpose has them
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)  # of these, those that exchange width and height
LONGEST = 50  # times the shorter side, of pictures that are resized by it and of which nothing is cut off
TAIL = 4096  # bytes in which a file's end mark is looked for
FRAMES = ("GIF", "PNG", "WEBP", "AVIF")  # an MPO, which phones write, is one photograph with a preview

# What makes a picture one that cannot be used; the other problems are mended while it is decoded.
EMPTY, BROKEN, TRUNCATED = "empty file", "file that is no picture", "truncated picture"
BOMB = f"picture of more than {MOST_PIXELS // 1_000_000} million pixels"
UNUSABLE = (EMPTY, BROKEN, TRUNCATED, BOMB)
# And how the others are mended.
MENDED = {
    "animated picture": "its first frame is taken",
    "picture of several pages": "its first page is taken",
    "CMYK picture": "made RGB",
    "16-bit picture": "made 8-bit",
    "floating-point picture": "made 8-bit, 1 as white",
    "transparent picture": "laid on white",
    "grey picture": "made RGB",
    "picture rotated by EXIF": "turned upright",
    "tiny picture": f"scaled up from fewer than {TINY} pixels",
    "huge picture": "decoded at every use, which takes seconds: make smaller copies",
}
# What libraries raise for damaged content; PIL's decoders pass on whatever their parsers meet.
UNREADABLE = (
    OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, EOFError, OverflowError, MemoryError,
    AttributeError, ArithmeticError, NotImplementedError, RuntimeError, Image.DecompressionBombError,
)  # fmt: skip

# PIL warns of half of MOST_PIXELS; the check of a data set tells of such pictures in its own table.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_picture(file: File, enough: Enough | None = None) -> Image.Image:
    """A picture as RGB of 8 bits, as a person would see it.

    It is turned upright by its EXIF mark, laid on white where it is transparent; of an animation the first
    frame is taken. Its format is told by its content, whatever the file's name.

    Args:
        file: a path, or the bytes of a file.
        enough: says how many pixels of the shorter side are: a JPEG is then decoded at a half, a quarter or
            an eighth, a large one in a sixth of the time (`python -m benchmarks.picture_loading`).

    Raises:
        DataError: it is missing, damaged, no picture, or of more than MOST_PIXELS pixels. PostScript is
            never opened: that is a program.
    """
    try:
        with opened_image(_source(file)) as image:
            if enough is not None:
                turned = _orientation(image) in SIDEWAYS
                by = enough(*(image.size[::-1] if turned else image.size)) / min(image.size)
                image.draft(None, (math.ceil(image.width * by), math.ceil(image.height * by)))
            return _upright(_rgb(image), image)
    except UNREADABLE as error:
        raise DataError(
            f"{_name(file)} cannot be read as a picture ({_reason(error)}). Copy it anew, or leave it out."
        ) from None


def problems_of(file: File, whole: bool = True) -> list[str]:
    """What is wrong with a picture or unusual about it: of UNUSABLE at most one, or keys of MENDED.

    Args:
        file: a path, or the bytes of a file.
        whole: decode all of it. Otherwise its head and its end are looked at, which finds a truncated JPEG
            or PNG in a fraction of the time, and damage in the middle not.
    """
    try:
        if not (len(file) if isinstance(file, bytes) else os.stat(file).st_size):
            return [EMPTY]
        with opened_image(_source(file)) as image:
            found = _unusual(image)
            if not ((not whole and _ends(file, image.format)) or _decodes(image)):
                return [TRUNCATED]
            return found
    except Image.DecompressionBombError:
        return [BOMB]
    except UNREADABLE:
        return [BROKEN]


def opened_image(file: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """PIL's image of any format but PostScript, whatever the file's name: that is a program, and PIL has
    Ghostscript run it.

    Raises:
        OSError: it cannot be read, or is no image.
    """
    return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def image_size(file: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(width, height) of an image file from its first bytes, None where it is not one."""
    try:
        with opened_image(file) as image:
            return image.size
    except UNREADABLE:
        return None


def is_strip(width: int, height: int) -> bool:
    """Whether a picture is so long that resized by its shorter side it would fill the memory, or resized by
    its longer side be no pixel wide."""
    return max(width, height) > LONGEST * min(width, height)


def _source(file: File) -> str | os.PathLike[str] | io.BytesIO:
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _name(file: File) -> str:
    return f"a file of {len(file):,} bytes" if isinstance(file, bytes) else str(Path(file))


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no format that is known"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, whole or floating, which PIL itself would cut off at 255."""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    most = float(values.max(initial=0))
    if image.mode == "F":
        values = values * 255 if most <= 1 else values
    elif most > 255 or image.mode.startswith("I;16"):
        values = values / 257  # 65535 is white
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8), "L")


def _upright(rgb: Image.Image, opened: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(opened))
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {}  # what the file says beside its pixels is not true of them any more
    return rgb


def _orientation(image: Image.Image) -> object:
    with contextlib.suppress(*UNREADABLE):  # damaged marks turn nothing
        return image.getexif().get(ROTATED)
    return None


def _unusual(image: Image.Image) -> list[str]:
    """Keys of MENDED, from a picture's head."""
    several = getattr(image, "is_animated", False)
    sixteen = image.mode.startswith("I")
    tests = {
        "animated picture": several and image.format in FRAMES,
        "picture of several pages": several and image.format == "TIFF",
        "CMYK picture": image.mode == "CMYK",
        "16-bit picture": sixteen,
        "floating-point picture": image.mode == "F",
        "transparent picture": image.has_transparency_data,
        "grey picture": image.mode in ("1", "L", "LA", "La") or sixteen,
        "picture rotated by EXIF": _orientation(image) in TURNS,
        "tiny picture": min(image.size) < TINY,
        "huge picture": image.width * image.height > HUGE,
    }
    return [problem for problem, found in tests.items() if found]


def _decodes(image: Image.Image) -> bool:
    """Whether all of the first frame can be read. A JPEG is drawn at an eighth: its data are read to the end
    all the same."""
    try:
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
    except (OSError, EOFError, SyntaxError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the picture's
        return False
    return True


def _ends(file: File, form: str | None) -> bool:
    """Whether a JPEG or PNG has its end mark; what cameras append behind it may follow."""
    marks = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
    mark = marks.get(form or "")
    if mark is None:
        return True
    if isinstance(file, bytes):
        return mark in file[-TAIL:]
    with open(file, "rb") as opened:
        opened.seek(-min(TAIL, os.stat(file).st_size), os.SEEK_END)
        return mark in opened.read()
