"""TransducerRecognizer: RNN-T loss and error rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_lightning.data.speech import SpeechBatch
from lora_lightning.tasks.ctc import SpeechRecognizer
from lora_lightning.tasks.vocabulary import BLANK, encode
from lora_lightning.utils.libraries import loading

with loading("torchaudio"):
    from torchaudio.functional import rnnt_loss


class TransducerRecognizer(SpeechRecognizer):
    """Trains an RNN-T, such as `lora_lightning.models.transducer.ConformerTransducer`, by torchaudio's loss
    (Graves 2012, arXiv 1211.3711); texts are decoded greedily.

    Options, logged numbers and errors are those of `SpeechRecognizer`.
    """

    aligns = False

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder gives: (batch, frames, width) and lengths in frames (batch,)."""
        model: Any = self.model
        return model.transcribe(waves, lengths)

    def transcribe(self, waves: Tensor, lengths: Tensor) -> list[str]:
        model: Any = self.model
        indices = model.greedy(waves, lengths)
        return [" ".join("".join(self.vocabulary[i] for i in row).split()) for row in indices]

    def batch_loss(self, batch: SpeechBatch) -> Tensor:
        """The loss a character, averaged over the utterances."""
        flat, lengths = encode(batch.texts, batch.ids, self.vocabulary)
        targets = pad_sequence(flat.split(lengths.tolist()), batch_first=True).int().to(batch.waves.device)
        lengths = lengths.int().to(batch.waves.device)
        begun = torch.nn.functional.pad(targets, (1, 0), value=BLANK)
        model: Any = self.model
        joint, frames, _, _ = model(batch.waves, batch.lengths, begun, lengths + 1)
        losses = rnnt_loss(joint.float(), targets, frames.int(), lengths, blank=BLANK, reduction="none")
        return (losses / lengths.clamp(min=1)).mean()

    def predict_and_loss(self, batch: SpeechBatch) -> tuple[list[str], Tensor]:
        return self.transcribe(batch.waves, batch.lengths), self.batch_loss(batch)
