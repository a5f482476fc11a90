"""What is answered of sounds: words with their times, the segments as they are heard."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.serving.inputs import BadUpload, Limits, wave_of
from lora_lightning.serving.kinds import Base, Facts, Options, Work
from lora_lightning.tasks.transcription import Chunk, OpenWave, Segment, Transcriber

ALIKE = 4 * SAMPLE_RATE  # samples: chunks within the same multiple of it are padded to the longest


class Words:
    """What is said when."""

    name = "transcribe"

    def __init__(self, base: Base, limits: Limits) -> None:
        self.base, self.limits = base, limits
        self.transcriber = Transcriber(base.model, list(base.facts["vocabulary"]))

    def prepare(self, body: bytes, facts: Facts, options: Options) -> Work:
        transcriber = copy.copy(self.transcriber)
        transcriber.vocabulary = list(facts.get("vocabulary", self.transcriber.vocabulary))
        if len(transcriber.vocabulary) != len(self.transcriber.vocabulary):
            raise BadUpload(409, "the adapter's vocabulary is not the base's: name another adapter.")
        heard = transcriber.opened(wave_of(body, self.limits))
        sofar = _Sofar(transcriber, heard)
        return Work(
            [(len(chunk.samples) // ALIKE, chunk) for chunk in heard.waiting],
            lambda outputs: transcriber.transcription(heard).to_dict(),
            sofar.told if options.get("stream") else None,
        )

    def run(self, units: Sequence[Chunk]) -> list[None]:
        with self.base.fabric.autocast():
            self.transcriber.hear(units)
        return [None] * len(units)


class _Sofar:
    """The segments of a wave that stand already: those before the first sound not heard to its end."""

    def __init__(self, transcriber: Transcriber, heard: OpenWave) -> None:
        self.transcriber, self.heard, self.frame = transcriber, heard, 0

    def told(self) -> list[dict[str, Any]]:
        """Those that were not told before."""
        end = min((chunk.begin for chunk in self.heard.waiting), default=len(self.heard.log_probs))
        if end <= self.frame:
            return []
        part = self.heard.log_probs[self.frame : end]
        segments: list[Segment] = self.transcriber.segments(part, self.frame)
        self.frame = end
        return [{"segment": asdict(segment)} for segment in segments]
