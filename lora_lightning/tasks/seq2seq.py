"""Seq2SeqRecognizer: cross entropy over tokens and error rates, for Whisper."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_lightning.data.speech import SpeechBatch
from lora_lightning.data.text import normalize
from lora_lightning.tasks.ctc import SpeechRecognizer


class Seq2SeqRecognizer(SpeechRecognizer):
    """Trains an encoder-decoder with a tokenizer of its own, such as `lora_lightning.models.whisper.Whisper`:
    `loss(waves, lengths, texts)` and `transcribe(waves, lengths)` are the model's.

    The data's vocabulary is that of the texts, as they were normalized; the model writes what it likes.
    Options, logged numbers and errors are those of `SpeechRecognizer`.
    """

    aligns = False

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder gives: (batch, frames, width) and lengths in frames (batch,)."""
        return self.model(waves, lengths)

    def transcribe(self, waves: Tensor, lengths: Tensor) -> list[str]:
        """Normalized as the references are: Whisper by itself writes capitals and punctuation."""
        model: Any = self.model
        return [normalize(text) for text in model.transcribe(waves, lengths)]

    def batch_loss(self, batch: SpeechBatch) -> Tensor:
        model: Any = self.model
        return model.loss(batch.waves, batch.lengths, batch.texts)

    def predict_and_loss(self, batch: SpeechBatch) -> tuple[list[str], Tensor]:
        return self.transcribe(batch.waves, batch.lengths), self.batch_loss(batch)
