"""Audio files as mono tensors at one rate: wav, flac, ogg, mp3 and what else libsndfile reads."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.errors import UserError
from lora_lightning.utils.libraries import loading

with loading("torchaudio"):
    from torchaudio.transforms import Resample

WHOLE = 0.95  # least share of the samples that a header promises which a sound file holds
LOUDEST = 1e6  # more than any integers that were not scaled; its square is a number in float32
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf", ".sph")
File = str | Path | bytes


class AudioError(UserError, ValueError):
    """A file that cannot be read as audio; the message names it and says why."""


class AudioInfo(NamedTuple):
    """What the header of a file says: its duration in seconds, rate in Hz, channels."""

    seconds: float
    rate: int
    channels: int


def audio_info(path: File) -> AudioInfo:
    """The header of a file; nothing is decoded.

    Raises:
        AudioError: missing or not audio.
    """
    with _opened(path) as file:
        return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels)


def read_audio(
    path: File, start: float | None = None, end: float | None = None, rate: int = SAMPLE_RATE
) -> Tensor:
    """A file, or a part of it, as float32 in [-1, 1]: decoded by libsndfile, channels averaged, resampled
    by torchaudio (windowed sinc).

    Args:
        path: the file, or its bytes.
        start: seconds at which the part begins; None is 0.
        end: seconds at which it ends; None, or past it, is the file's end.
        rate: of the result, in Hz.

    Returns:
        (samples,)

    Raises:
        AudioError: missing, not audio, damaged, or without a sample in the part asked for.
    """
    samples, own = decode(path, start, end)
    wave = torch.from_numpy(samples).mean(1)
    if not (wave.abs() < LOUDEST).all():  # nor is what is no number
        told = "holds samples that are no numbers, or far beyond [-1, 1]: save it anew"
        raise AudioError(f"{_name(path)}: {told}")
    return wave if own == rate else _resampler(own, rate)(wave)


def decode(path: File, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, int]:
    """The samples (samples, channels) of a file or a part of it, as they are, and their rate in Hz.

    Raises:
        AudioError: as `read_audio`.
    """
    with _opened(path) as file:
        try:
            first = round((start or 0) * file.samplerate)
            last = file.frames if end is None else min(file.frames, round(end * file.samplerate))
            if first >= last:
                part = f"{start or 0:g} s to {_seconds(end)}"
                raise AudioError(f"{_name(path)}: has no sample from {part}: give a part of it")
            if first:
                file.seek(first)
            samples = file.read(last - first, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{_name(path)}: is damaged ({_reason(error)}): copy it anew") from error
        if len(samples) < WHOLE * (last - first):
            held, promised = len(samples) / file.samplerate, (last - first) / file.samplerate
            raise AudioError(
                f"{_name(path)}: is cut short ({held:.1f} of {promised:.1f} s can be decoded): copy it anew"
            )
        return samples, file.samplerate


@functools.lru_cache(maxsize=16)
def _resampler(own: int, rate: int) -> Resample:
    """Its kernel is computed once for each pair of rates."""
    return Resample(own, rate)


def _opened(path: File) -> soundfile.SoundFile:
    if not isinstance(path, bytes) and not Path(path).is_file():
        raise AudioError(f"{path}: there is no such file: give one that there is")
    try:
        return soundfile.SoundFile(_Bytes(path) if isinstance(path, bytes) else str(path))
    except soundfile.LibsndfileError as error:
        reason = f"is no audio file that libsndfile reads ({_reason(error)})"
        raise AudioError(f"{_name(path)}: {reason}: convert it to WAV or FLAC") from error


class _Bytes(io.BytesIO):
    """A file in memory that is at its beginning where libsndfile, misled by a damaged one, asks for what is
    before it; an exception there, within a call of C, would be told to the log alone."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return super().seek(0)


def _name(path: File) -> str:
    return f"a file of {len(path):,} bytes" if isinstance(path, bytes) else str(path)


def _reason(error: soundfile.LibsndfileError) -> str:
    return str(error.error_string).strip().rstrip(".")


def _seconds(value: float | None) -> str:
    return "its end" if value is None else f"{value:g} s"
