"""Uploads made pictures and sounds, within limits that are looked at before anything is decoded."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_lightning.data.decoding import LONGEST, UNREADABLE, is_strip, opened_image, read_picture
from lora_lightning.data.findings import DataError
from lora_lightning.errors import UserError

warnings.filterwarnings("ignore", module="PIL")  # it tells the log of every damaged mark of a picture

KERNEL = 4_000_000  # numbers of a resampling filter: rates without a common divisor need one of gigabytes
LARGE = 4 * 2**20  # bytes of an upload, or twice as many pixels of a picture, which take long
VALUES = 192_000  # samples a second, of all channels together: 48 kHz of four, 96 kHz of two


class BadUpload(UserError):
    """An upload that cannot be used.

    Args:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What an upload may be.

    Attributes:
        pixels: of a picture.
        seconds: of a sound.
    """

    pixels: int = 50_000_000
    seconds: float = 600.0


def is_large(body: bytes) -> bool:
    """Whether an upload takes long to decode; its head alone is looked at."""
    if len(body) > LARGE:
        return True
    try:
        with opened_image(io.BytesIO(body)) as image:
            return image.width * image.height > 2 * LARGE
    except UNREADABLE:
        return False


def picture_of(body: bytes, limits: Limits) -> Tensor:
    """An uploaded picture, as `read_picture` gives it: (height, width, 3), uint8.

    Raises:
        BadUpload: it is none, is damaged, or has more pixels than are allowed, which its head says.
    """
    try:
        with opened_image(io.BytesIO(body)) as image:
            width, height = image.size
    except Image.DecompressionBombError:  # Pillow's own limit, before it says how many
        raise BadUpload(
            413, f"the picture is too large; {limits.pixels:,} pixels are allowed: send a smaller one."
        ) from None
    except UNREADABLE:
        raise BadUpload(
            415, "the file is no picture of a format that is known: send a JPEG or PNG."
        ) from None
    if width * height > limits.pixels:
        raise BadUpload(
            413,
            f"the picture has {width} x {height} pixels; {limits.pixels:,} are allowed: send a smaller one.",
        )
    try:
        return torch.from_numpy(np.array(read_picture(body)))
    except (DataError, *UNREADABLE) as error:
        reason = str(error) if isinstance(error, DataError) else type(error).__name__
        raise BadUpload(422, f"the picture is damaged: {reason} Send another.") from None


def unstretched(pixels: Tensor) -> Tensor:
    """A picture that is shown whole, resized by its shorter side.

    Raises:
        BadUpload: it is so long that resized it would fill the memory, or be no pixel wide.
    """
    height, width = pixels.shape[:2]
    if is_strip(width, height):
        told = f"the picture has {width} x {height} pixels: send one at most {LONGEST} times as long as wide."
        raise BadUpload(422, told)
    return pixels


def wave_of(body: bytes, limits: Limits) -> Tensor:
    """An uploaded sound, as `read_audio` gives it: (samples,), 16 kHz.

    Raises:
        BadUpload: it is none, is damaged, empty, or longer than is allowed, which its head says.
    """
    from lora_lightning.data.audio import AudioError, audio_info, read_audio
    from lora_lightning.data.speech import SAMPLE_RATE

    try:
        info = audio_info(body)
    except AudioError:
        raise BadUpload(415, "the file is no sound of a format that is known: send WAV or FLAC.") from None
    if not 0 < info.seconds <= limits.seconds:
        raise BadUpload(
            413, f"the sound has {info.seconds:.6g} seconds, and {limits.seconds:g} are allowed: send a part."
        )
    common = math.gcd(info.rate, SAMPLE_RATE)
    if info.rate * SAMPLE_RATE // common**2 > KERNEL or info.rate * info.channels > VALUES:
        raise BadUpload(
            422, f"the sound has {info.channels} channels at {info.rate} Hz: give a usual rate, as 16000."
        )
    try:
        return read_audio(body)
    except AudioError as error:
        raise BadUpload(422, f"the sound is damaged: {str(error).partition(': ')[2]}.") from None
