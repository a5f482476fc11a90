"""Recognizer: what reports, samples and routing need of a task that hears speech."""

from __future__ import annotations

from abc import abstractmethod

import lightning as L
from torch import Tensor, nn

from lora_lightning.tasks.reporting import Reporting
from lora_lightning.tasks.scores import Score


class Recognizer(Reporting, L.LightningModule):
    """A Lightning module that transcribes.

    Attributes:
        model: the network that is adapted.
        vocabulary: what each output stands for: first the blank, then characters.
        kept: accents that are validated and tested beside those of the training data.
        scores: what the test counts by.
        aligns: whether forward gives outputs by which a text can be aligned.
    """

    model: nn.Module
    vocabulary: list[str]
    kept: list[str]
    scores: tuple[Score, ...] = (
        Score("wer", "WER %", fewer=True, best="min"),
        Score("cer", "CER %", best="min"),
    )
    aligns = True

    @abstractmethod
    def transcribe(self, waves: Tensor, lengths: Tensor) -> list[str]:
        """What is said in waves (batch, samples) of these lengths."""
