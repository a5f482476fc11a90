"""Listener: what is said in recordings of any length, heard in parts by any recognizer; as plain values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_lightning.data.speech import SAMPLE_RATE

DYNAMICS, QUIETEST = 35.0, -60.0  # dB below the loudest parts, and of full scale, that count as silence


@dataclass(frozen=True)
class Word:
    """A word, when it begins and ends in seconds, and the mean probability of its letters."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Segment:
    """Words between two pauses."""

    text: str
    start: float
    end: float
    words: list[Word]


@dataclass(frozen=True)
class Transcription:
    """What is said in one recording of so many seconds."""

    seconds: float
    segments: list[Segment]

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, fit for JSON."""
        return {"seconds": self.seconds, "text": self.text, "segments": [asdict(s) for s in self.segments]}


class Chunk(Protocol):
    """A part of a wave that is heard at once: its samples, and where the sound between two silences begins
    that it is of."""

    samples: Tensor
    begin: int


class OpenWave(Protocol):
    """A wave in work, and its chunks that are not yet heard."""

    samples: int
    waiting: list[Any]


class Listener(ABC):
    """Hears waves of any length: each is opened into chunks, of which several, also of other waves, are heard
    at once; when none waits any more, it is transcribed.

    Attributes:
        batch: chunks that `all` has heard together.
    """

    batch: int

    @abstractmethod
    def opened(self, wave: Tensor) -> Any:
        """An `OpenWave` of a wave (samples,), 16 kHz."""

    @abstractmethod
    def hear(self, chunks: Sequence[Any]) -> None:
        """Put what is heard in chunks where it belongs."""

    @abstractmethod
    def settled(self, heard: Any, since: int) -> tuple[int, list[Segment]]:
        """What stands of a wave in work: the segments before the first sound that is not heard to its end.

        Args:
            since: 0, or what was given the last time: those from then on.
        """

    def transcription(self, heard: Any) -> Transcription:
        """What is said in a wave that was heard to its end."""
        return Transcription(round(heard.samples / SAMPLE_RATE, 3), self.settled(heard, 0)[1])

    def __call__(self, wave: Tensor) -> Transcription:
        """What is said in a wave (samples,), 16 kHz."""
        return next(self.all([wave]))

    def all(self, waves: Iterable[Tensor]) -> Iterator[Transcription]:
        """What is said in each wave (samples,), in order; chunks of several are heard together."""
        open_waves: list[OpenWave] = []
        for chunks in self._batches(waves, open_waves):
            self.hear(chunks)
            while open_waves and not open_waves[0].waiting:
                done = open_waves.pop(0)
                yield self.transcription(done)

    def _batches(self, waves: Iterable[Tensor], open_waves: list[OpenWave]) -> Iterator[list[Chunk]]:
        """Chunks of all waves, `batch` at a time; and an empty list for a wave that has none."""
        waiting: list[Chunk] = []
        for wave in waves:
            whole = self.opened(wave)
            open_waves.append(whole)
            waiting += sorted(whole.waiting, key=lambda chunk: -len(chunk.samples))  # little padding
            while len(waiting) >= self.batch or not whole.waiting:
                yield waiting[: self.batch]
                del waiting[: self.batch]
                if not whole.waiting:
                    break
        while waiting:
            yield waiting[: self.batch]
            del waiting[: self.batch]


def sounding(wave: Tensor, hop: int, pause: float) -> list[tuple[int, int]]:
    """Frames at which sound begins and ends: between silences of `pause` frames or more.

    Args:
        hop: samples of a frame.
    """
    padded = torch.nn.functional.pad(wave, (0, -len(wave) % hop)).view(-1, hop)
    level = 10 * padded.square().mean(1).clamp(min=1e-12).log10()
    if not len(level):
        return []
    loud = (level > max(float(level.quantile(0.95)) - DYNAMICS, QUIETEST)).nonzero()[:, 0].tolist()
    spans: list[tuple[int, int]] = []
    for t in loud:
        if spans and t - spans[-1][1] < pause:
            spans[-1] = (spans[-1][0], t + 1)
        else:
            spans.append((t, t + 1))
    return spans


def to_srt(transcription: Transcription) -> str:
    """SubRip subtitles, one for each segment."""
    blocks = [
        f"{i}\n{_stamp(segment.start)} --> {_stamp(segment.end)}\n{segment.text}\n"
        for i, segment in enumerate(transcription.segments, 1)
    ]
    return "\n".join(blocks)


def _stamp(seconds: float) -> str:
    """`00:01:02,345`"""
    milliseconds = round(1000 * seconds)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"
