"""Decoding: a picture of any mode is seen as a person sees it; what is wrong with one has a name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_lightning.data.decoding import (
    BOMB,
    BROKEN,
    EMPTY,
    MOST_PIXELS,
    TRUNCATED,
    problems_of,
    read_picture,
)
from lora_lightning.data.findings import DataError

# Red, green, blue and grey quarters: 8 x 8 each, as whole blocks of a JPEG.
QUARTERS = np.zeros((16, 16, 3), np.uint8)
QUARTERS[:8, :8, 0] = QUARTERS[:8, 8:, 1] = QUARTERS[8:, :8, 2] = 255
QUARTERS[8:, 8:] = 128
UPRIGHT = Image.fromarray(QUARTERS)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    picture = read_picture(content)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def turned(orientation: int, form: str = "PNG") -> bytes:
    mark = Image.Exif()
    mark[0x0112] = orientation
    return encoded(UPRIGHT, form, exif=mark)


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, QUARTERS),
        (2, QUARTERS[:, ::-1]),
        (3, QUARTERS[::-1, ::-1]),
        (4, QUARTERS[::-1]),
        (5, QUARTERS.transpose(1, 0, 2)),
        (6, np.rot90(QUARTERS, -1)),
        (7, QUARTERS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(QUARTERS)),
    ],
)
def test_exif_marks_turn_a_picture_upright(orientation, expected):
    content = turned(orientation)
    assert np.array_equal(pixels(content), expected)
    assert problems_of(content) == ([] if orientation == 1 else ["picture rotated by EXIF"])


def test_marks_that_mean_nothing_turn_nothing():
    assert np.array_equal(pixels(turned(77)), QUARTERS)
    assert problems_of(turned(77)) == []


def grey(values) -> Image.Image:
    return Image.fromarray(values.reshape(16, 16))


RAMP = np.arange(256)


@pytest.mark.parametrize(
    ("image", "form", "found"),
    [
        (grey(RAMP.astype(np.uint8)), "PNG", ["grey picture"]),
        (grey((RAMP * 257).astype(np.uint16)), "PNG", ["16-bit picture", "grey picture"]),
        (grey((RAMP * 257).astype(np.uint16)), "TIFF", ["16-bit picture", "grey picture"]),
        (grey((RAMP * 257).astype(np.int32)), "TIFF", ["16-bit picture", "grey picture"]),
        (grey((RAMP / 255).astype(np.float32)), "TIFF", ["floating-point picture"]),
        (grey(RAMP.astype(np.float32)), "TIFF", ["floating-point picture"]),
    ],
    ids=["8 bits", "16 bits in PNG", "16 bits in TIFF", "32 bits", "floats to 1", "floats to 255"],
)
def test_grey_of_every_depth_keeps_its_tones(image, form, found):
    content = encoded(image, form)
    assert np.array_equal(pixels(content)[..., 1].ravel(), RAMP)
    assert problems_of(content) == found


def test_what_is_transparent_is_laid_on_white():
    clear = UPRIGHT.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(QUARTERS[..., 0] == 255, 0, 255).astype(np.uint8)))
    palette = UPRIGHT.quantize(8)
    red = palette.getpixel((0, 0))
    for content in (encoded(clear, "PNG"), encoded(palette, "PNG", transparency=red)):
        seen = pixels(content)
        assert seen[0, 0].tolist() == [255] * 3
        assert seen[0, 15].tolist() == [0, 255, 0]
        assert problems_of(content) == ["transparent picture"]


def test_cmyk_is_made_rgb():
    content = encoded(UPRIGHT.convert("CMYK"), "TIFF")
    assert np.array_equal(pixels(content), QUARTERS)
    assert problems_of(content) == ["CMYK picture"]


@pytest.mark.parametrize(
    ("form", "found"),
    [("GIF", "animated picture"), ("PNG", "animated picture"), ("TIFF", "picture of several pages")],
)
def test_the_first_of_several_frames_is_taken(form, found):
    content = encoded(UPRIGHT, form, save_all=True, append_images=[UPRIGHT.rotate(90)])
    assert np.array_equal(pixels(content), QUARTERS)
    assert problems_of(content) == [found]


def test_a_photograph_with_a_preview_is_one_picture():
    content = encoded(UPRIGHT, "MPO", save_all=True, append_images=[UPRIGHT.resize((8, 8))])
    assert problems_of(content) == []


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
WHOLE = {form: encoded(NOISE, form) for form in ("JPEG", "PNG", "GIF", "BMP", "TIFF")}
BAD = {
    "empty": (b"", EMPTY),
    "text": (b"<html>not found</html>", BROKEN),
    "head of a JPEG": (WHOLE["JPEG"][:100], BROKEN),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", BROKEN),
    "JPEG without its end": (WHOLE["JPEG"][:-20], TRUNCATED),
    "half a PNG": (WHOLE["PNG"][: len(WHOLE["PNG"]) // 2], TRUNCATED),
    "half a GIF": (WHOLE["GIF"][: len(WHOLE["GIF"]) // 2], TRUNCATED),
    "bomb": (encoded(Image.new("1", (20_000, MOST_PIXELS // 20_000 + 1)), "PNG"), BOMB),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_has_a_name_and_one_message(name, tmp_path):
    content, problem = BAD[name]
    file = tmp_path / "photo.jpg"
    file.write_bytes(content)
    assert problems_of(file) == problems_of(content) == [problem]
    for source, named in ((file, str(file)), (content, f"a file of {len(content):,} bytes")):
        with pytest.raises(DataError, match="cannot be read as a picture") as error:
            read_picture(source)
        assert str(error.value).startswith(named)
        assert "\n" not in str(error.value)


def test_a_png_that_lacks_nothing_but_its_end_mark_is_whole():
    content = WHOLE["PNG"][:-12]
    assert problems_of(content) == problems_of(content, whole=False) == []
    assert read_picture(content).size == (64, 64)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_quick_look_finds_what_lacks_its_end(form, tmp_path):
    file = tmp_path / "photo"
    for content in (WHOLE[form], WHOLE[form] + bytes(2000)):
        file.write_bytes(content)
        assert problems_of(file, whole=False) == problems_of(content, whole=False) == []
    file.write_bytes(WHOLE[form][:-200])
    assert problems_of(file, whole=False) == [TRUNCATED]


def test_sizes_that_are_told():
    assert problems_of(encoded(UPRIGHT.resize((9, 40)), "PNG")) == ["tiny picture"]
    assert "huge picture" in problems_of(encoded(Image.new("1", (10_000, 5_001)), "PNG"), whole=False)


def test_a_missing_file_is_told(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone.jpg cannot be read as a picture \(there is no such file\)"):
        read_picture(tmp_path / "gone.jpg")
