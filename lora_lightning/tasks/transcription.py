"""Transcriber: what is said when in recordings of any length, by any CTC recognizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.tasks.listening import Listener, Segment, Word, sounding
from lora_lightning.tasks.vocabulary import BLANK, Decoder, encode, greedy
from lora_lightning.utils.libraries import loading

with loading("torchaudio"):
    from torchaudio.functional import forced_align, merge_tokens

PROBES = (2 * SAMPLE_RATE, 10 * SAMPLE_RATE)  # samples of the silences that tell how far apart outputs are
SPACES = (" ", "|")
SILENT = -30.0  # ln P of a letter where nothing sounds


@dataclass(eq=False)
class OpenWave:
    """A wave in work: log-probabilities (frames, vocabulary) so far, and the chunks not yet heard."""

    log_probs: Tensor
    samples: int
    waiting: list[Chunk]


@dataclass(eq=False)
class Chunk:
    """A part of a wave that is heard at once: its first frame, the frames that are used, and where the
    sound between two silences begins that it is of."""

    samples: Tensor
    first: int
    used: tuple[int, int]
    whole: OpenWave
    begin: int


class Transcriber(Listener):
    """Recognizes waves of any length, in overlapping chunks where they have no pauses.

    What lies between two silences is heard by itself, as the utterances were that a model was trained on;
    what is longer than a chunk, in chunks. Of each chunk only the outputs are used that lie `overlap / 2`
    from its ends or more, where the model has heard what comes before and after; they are put together
    output by output, since every model here is the same for a wave that begins an output later. Each piece
    is decoded by itself, and its words placed by forced alignment (torchaudio; Pratap et al. 2023, arXiv
    2305.13516).

    Args:
        model: (waves (batch, samples), lengths) -> (logits (batch, frames, vocabulary), lengths in frames).
        vocabulary: what the outputs stand for: first the blank.
        decoder: such as `lora_lightning.tasks.decoding.BeamDecoder`; None is the best output of each frame.
        chunk: seconds that the model hears at once.
        overlap: seconds that neighbouring chunks share.
        batch: chunks that are heard together.
        pause: seconds without a letter that end a segment.
        longest: seconds of a segment, where it has a pause between words at all.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Sequence[str],
        decoder: Decoder | None = None,
        chunk: float = 20.0,
        overlap: float = 4.0,
        batch: int = 4,
        pause: float = 0.6,
        longest: float = 8.0,
    ) -> None:
        self.model, self.vocabulary, self.decoder = model.eval(), list(vocabulary), decoder or greedy
        self.device = next(model.parameters()).device
        self.hop = self._hop()  # samples between two outputs
        frame = self.hop / SAMPLE_RATE
        self.chunk, self.margin = max(4, round(chunk / frame)), round(overlap / 2 / frame)  # in frames
        self.batch, self.pause, self.longest = batch, pause / frame, longest / frame

    def log_probs(self, wave: Tensor) -> Tensor:
        """(frames, vocabulary) of a wave (samples,) of any length; certain blanks where it is silent."""
        heard = self.opened(wave)
        while heard.waiting:
            self.hear(heard.waiting[: self.batch])
        return heard.log_probs

    @torch.no_grad()
    def _hop(self) -> int:
        frames = []
        for samples in PROBES:
            wave = torch.zeros(1, samples, device=self.device)
            frames.append(int(self.model(wave, torch.tensor([samples], device=self.device))[1]))
        return round((PROBES[1] - PROBES[0]) / (frames[1] - frames[0]))

    def opened(self, wave: Tensor) -> OpenWave:
        """A wave's chunks, and room for what is heard in them."""
        frames = math.ceil(len(wave) / self.hop)
        log_probs = torch.full((frames, len(self.vocabulary)), SILENT)
        log_probs[:, BLANK] = 0.0
        whole = OpenWave(log_probs, len(wave), [])
        stride = self.chunk - 2 * self.margin
        for begin, end in sounding(wave, self.hop, self.pause):
            count = 1 + max(0, math.ceil((end - begin - self.chunk) / stride))
            for i in range(count):
                first = begin + i * stride
                last = min(end, first + self.chunk)
                used = (first + (self.margin if i else 0), last - (self.margin if i < count - 1 else 0))
                samples = wave[first * self.hop : last * self.hop]
                whole.waiting.append(Chunk(samples, first, used, whole, begin))
        return whole

    @torch.inference_mode()
    def hear(self, chunks: Sequence[Chunk]) -> None:
        """Put what is heard in chunks where it belongs."""
        if not chunks:
            return
        waves = pad_sequence([chunk.samples for chunk in chunks], batch_first=True).to(self.device)
        lengths = torch.tensor([len(chunk.samples) for chunk in chunks], device=self.device)
        logits, frames = self.model(waves, lengths)
        rows = logits.float().log_softmax(-1).cpu()
        for chunk, row, count in zip(chunks, rows, frames.tolist(), strict=True):
            begin, end = chunk.used
            end = min(end, chunk.first + count)
            chunk.whole.log_probs[begin:end] = row[begin - chunk.first : end - chunk.first]
            chunk.whole.waiting.remove(chunk)

    def settled(self, heard: OpenWave, since: int) -> tuple[int, list[Segment]]:
        """As of any listener; counts in frames."""
        end = min((chunk.begin for chunk in heard.waiting), default=len(heard.log_probs))
        return end, self.segments(heard.log_probs[since:end], since) if end > since else []

    def segments(self, log_probs: Tensor, first: int = 0) -> list[Segment]:
        """What is said in a part of a wave between two silences.

        Args:
            log_probs: (frames, vocabulary).
            first: frame of the whole at which the part begins.
        """
        segments = []
        for begin, end in self._pieces(log_probs):
            piece = log_probs[begin:end]
            text = self.decoder(piece[None], torch.tensor([len(piece)]), self.vocabulary)[0]
            if words := self._placed(piece, text, first + begin):
                segments.append(Segment(text, words[0].start, words[-1].end, words))
        return segments

    def _pieces(self, log_probs: Tensor) -> list[tuple[int, int]]:
        """Frames at which the whole is cut: between words, at pauses, and where a piece gets too long."""
        words = self._heard_words(log_probs.argmax(-1).tolist())
        cuts = [0]
        for (_, before), (after, _) in pairwise(words):
            if after - before >= self.pause:
                cuts.append((before + after) // 2)
        cuts.append(len(log_probs))
        pieces = []
        for begin, end in pairwise(cuts):
            pieces += self._split(begin, end, [w for w in words if begin <= w[0] < end])
        return pieces

    def _split(self, begin: int, end: int, words: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """A piece, halved at its longest pause near the middle as long as it is too long."""
        if not words or words[-1][1] - words[0][0] <= self.longest or len(words) == 1:
            return [(begin, end)]
        centre, span = (words[0][0] + words[-1][1]) / 2, words[-1][1] - words[0][0]
        pauses = [(b[0] - a[1], (a[1] + b[0]) // 2) for a, b in pairwise(words)]
        inner = [p for p in pauses if abs(p[1] - centre) <= span / 4] or pauses
        cut = max(inner)[1]
        left = [w for w in words if w[0] < cut]
        return self._split(begin, cut, left) + self._split(cut, end, words[len(left) :])

    def _heard_words(self, path: Sequence[int]) -> list[tuple[int, int]]:
        """First frame and frame behind the last one of each word on the best path; a pause ends one, too."""
        words: list[tuple[int, int]] = []
        inside = False
        for t, i in enumerate(path):
            if self.vocabulary[i] in SPACES:
                inside = False
            elif i:
                if inside and t - words[-1][1] < self.pause:
                    words[-1] = (words[-1][0], t + 1)
                else:
                    words.append((t, t + 1))
                inside = True
        return words

    def _placed(self, log_probs: Tensor, text: str, begin: int) -> list[Word]:
        """The words of a text where its best alignment has them."""
        if not text:
            return []
        targets = encode([text], [""], self.vocabulary)[0][None]
        path, scores = forced_align(log_probs[None].contiguous(), targets, blank=0)
        spans = merge_tokens(path[0], scores[0].exp(), blank=0)
        words, position, second = [], 0, self.hop / SAMPLE_RATE
        for word in text.split(" "):
            letters = spans[position : position + len(word)]
            words.append(
                Word(
                    word,
                    round((begin + letters[0].start) * second, 3),
                    round((begin + letters[-1].end) * second, 3),
                    round(sum(s.score for s in letters) / len(letters), 3),
                )
            )
            position += len(word) + 1
        return words
