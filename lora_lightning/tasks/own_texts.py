"""TextListener: what is said in recordings of any length, by a model that writes texts by itself: Whisper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.tasks.listening import Listener, Segment, sounding

HOP = SAMPLE_RATE // 50  # samples of a frame
SMOOTH = 15  # frames over which it is looked where a long sound is quietest; odd


class TextModel(Protocol):
    """Hears windows of so many seconds, in eval mode."""

    seconds: int

    def transcribe(self, waves: Tensor, lengths: Tensor) -> list[str]:
        """The texts of waves (batch, samples) of these lengths."""


@dataclass(eq=False)
class OpenTexts:
    """A wave in work: what is said from which frame on so far, and the chunks not yet heard."""

    samples: int
    waiting: list[TextChunk] = field(default_factory=list)
    said: dict[int, Segment] = field(default_factory=dict)


@dataclass(eq=False)
class TextChunk:
    """A part of a wave: the frames in which it sounds, and its samples, with some silence around."""

    samples: Tensor
    begin: int
    end: int
    whole: OpenTexts


class TextListener(Listener):
    """Recognizes waves of any length by a model with a window and a decoder of its own.

    What lies between two silences is heard by itself and is a segment, as the utterances were that a model
    was trained on; what is longer than the window is cut where it is quietest in the second half of it. Words
    have no times: the model has no outputs by which they could be placed.

    Args:
        model: such as `lora_lightning.models.whisper.Whisper`.
        device: where it runs.
        batch: chunks that are heard together.
        pause: seconds of silence that end a segment; of them half is heard on either side of a sound.
    """

    def __init__(
        self, model: TextModel, device: torch.device | str = "cpu", batch: int = 4, pause: float = 0.6
    ) -> None:
        self.model, self.device, self.batch = model, device, batch
        self.pause = round(pause * SAMPLE_RATE / HOP)  # in frames, as all that follows
        self.margin = self.pause // 2
        self.longest = model.seconds * SAMPLE_RATE // HOP - 2 * self.margin

    def opened(self, wave: Tensor) -> OpenTexts:
        """A wave's chunks."""
        whole = OpenTexts(len(wave))
        for first, last in sounding(wave, HOP, self.pause):
            for begin, end in self._cut(wave, first, last):
                before = self.margin if begin == first else 0
                after = self.margin if end == last else 0
                samples = wave[max(0, begin - before) * HOP : (end + after) * HOP]
                whole.waiting.append(TextChunk(samples, begin, end, whole))
        return whole

    def _cut(self, wave: Tensor, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """A sound in parts that the model can hear."""
        while end - begin > self.longest:
            low = begin + self.longest // 2
            part = wave[low * HOP : (begin + self.longest) * HOP].view(-1, HOP)
            power = torch.nn.functional.avg_pool1d(part.square().mean(1)[None], SMOOTH, 1, SMOOTH // 2)
            cut = low + max(1, int(power.argmin()))
            yield begin, cut
            begin = cut
        yield begin, end

    @torch.inference_mode()
    def hear(self, chunks: Sequence[TextChunk]) -> None:
        if not chunks:
            return
        waves = pad_sequence([chunk.samples for chunk in chunks], batch_first=True).to(self.device)
        lengths = torch.tensor([len(chunk.samples) for chunk in chunks], device=self.device)
        for chunk, text in zip(chunks, self.model.transcribe(waves, lengths), strict=True):
            if text:
                start, end = (round(frame * HOP / SAMPLE_RATE, 3) for frame in (chunk.begin, chunk.end))
                chunk.whole.said[chunk.begin] = Segment(text, start, end, [])
            chunk.whole.waiting.remove(chunk)

    def settled(self, heard: OpenTexts, since: int) -> tuple[int, list[Segment]]:
        frames = math.ceil(heard.samples / HOP)
        end = min((chunk.begin for chunk in heard.waiting), default=frames)
        return end, [heard.said[begin] for begin in sorted(heard.said) if since <= begin < end]
