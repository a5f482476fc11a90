"""What is answered of sounds: segments as they are heard, with the times of words where there are any."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.serving.inputs import BadUpload, Limits, wave_of
from lora_lightning.serving.kinds import Base, Facts, Options, Work
from lora_lightning.tasks.listening import Listener
from lora_lightning.tasks.own_texts import TextListener
from lora_lightning.tasks.transcription import Transcriber


class Words:
    """What is said when, by a CTC recognizer."""

    name = "transcribe"
    alike = 4 * SAMPLE_RATE  # samples: chunks within the same multiple of it are padded to the longest

    def __init__(self, base: Base, limits: Limits) -> None:
        self.base, self.limits = base, limits
        self.listener = self.made()

    def made(self) -> Listener:
        """What hears."""
        return Transcriber(self.base.model, list(self.base.facts["vocabulary"]))

    def of(self, facts: Facts) -> Listener:
        """As an adapter writes.

        Raises:
            BadUpload: it writes other letters than the base has outputs for.
        """
        listener: Any = copy.copy(self.listener)
        own = len(listener.vocabulary)
        listener.vocabulary = list(facts.get("vocabulary", listener.vocabulary))
        if len(listener.vocabulary) != own:
            raise BadUpload(409, "the adapter's vocabulary is not the base's: name another adapter.")
        return listener

    def prepare(self, body: bytes, facts: Facts, options: Options) -> Work:
        listener = self.of(facts)
        heard = listener.opened(wave_of(body, self.limits))
        sofar = _Sofar(listener, heard)
        return Work(
            [(len(chunk.samples) // self.alike, chunk) for chunk in heard.waiting],
            lambda outputs: listener.transcription(heard).to_dict(),
            sofar.told if options.get("stream") else None,
        )

    def run(self, units: Sequence[Any]) -> list[None]:
        with self.base.fabric.autocast():
            self.listener.hear(units)
        return [None] * len(units)


class Texts(Words):
    """What is said in which segment, by a model that writes texts by itself."""

    alike = 60 * SAMPLE_RATE  # each fills the window

    def made(self) -> Listener:
        model: Any = self.base.model
        return TextListener(model, self.base.fabric.device)

    def of(self, facts: Facts) -> Listener:
        return self.listener


class _Sofar:
    """The segments of a wave that stand already."""

    def __init__(self, listener: Listener, heard: Any) -> None:
        self.listener, self.heard, self.since = listener, heard, 0

    def told(self) -> list[dict[str, Any]]:
        """Those that were not told before."""
        self.since, segments = self.listener.settled(self.heard, self.since)
        return [{"segment": asdict(segment)} for segment in segments]
