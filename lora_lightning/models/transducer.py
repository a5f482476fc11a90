"""conformer_transducer: torchaudio's RNN-T over the small Conformer of `lora_lightning.models.ctc`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_lightning.models.base_file import Weights
from lora_lightning.models.ctc import ConformerCTC, Dropout, Size, built, unknown
from lora_lightning.utils.checks import options_of, require
from lora_lightning.utils.libraries import loading

with loading("torchaudio"):
    from torchaudio.models import RNNT
    from torchaudio.models.rnnt import _Joiner, _Predictor, _Transcriber


class ConformerEncoder(ConformerCTC, _Transcriber):
    """The Conformer with a projection in place of its head: (waves, lengths) -> what the joiner sees."""

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, frames, width), frames (batch,) of waves (batch, samples), lengths (batch,)."""
        return super().forward(input, lengths)

    def infer(self, *_: object) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Of torchaudio's interface for streaming, which this encoder, hearing all at once, does not do."""
        raise NotImplementedError("the Conformer hears whole utterances")


class ConformerTransducer(RNNT):
    """RNN-T (Graves 2012, arXiv 1211.3711) from waves (batch, samples): torchaudio's, with its forward
    (waves, lengths, targets with a blank before them, lengths of these) and its parts by its names.

    Args:
        vocabulary: the number of outputs, the blank first.
        width: of the encoder, the predictor and the joiner.
        depth: Conformer layers.
        heads: of their attention.
        predictor_layers: LSTM layers over the characters so far.
        dropout: of encoder and predictor.
    """

    def __init__(
        self,
        vocabulary: int,
        width: Size = 128,
        depth: Size = 3,
        heads: Size = 4,
        predictor_layers: Size = 1,
        dropout: Dropout = 0.0,
    ) -> None:
        super().__init__(
            ConformerEncoder(width, width, depth, heads, dropout=dropout),
            _Predictor(
                vocabulary, width, width, predictor_layers, width, lstm_layer_norm=True, lstm_dropout=dropout
            ),
            _Joiner(width, vocabulary),
        )

    def get_classifier(self) -> nn.Module:
        """The output layer, of the joiner."""
        return self.joiner.linear

    @torch.no_grad()
    def greedy(self, waves: Tensor, lengths: Tensor, most: int = 5) -> list[list[int]]:
        """The most probable symbol at each step, blanks left out.

        Args:
            waves: (batch, samples).
            lengths: (batch,).
            most: symbols that one frame can give.
        """
        encoded, frames = self.transcribe(waves, lengths)
        one = torch.ones(len(waves), dtype=torch.int32, device=waves.device)
        last = torch.zeros(len(waves), 1, dtype=torch.int32, device=waves.device)
        predicted, _, state = self.predict(last, one, None)
        texts: list[list[int]] = [[] for _ in waves]
        for t in range(encoded.shape[1]):
            active = t < frames
            for _ in range(most):
                best = self.join(encoded[:, t : t + 1], one, predicted, one)[0][:, 0, 0].argmax(-1)
                active = active & (best != 0)
                if not active.any():
                    break
                for row in active.nonzero()[:, 0].tolist():
                    texts[row].append(int(best[row]))
                new, _, moved = self.predict(best[:, None].int(), one, state)
                predicted = torch.where(active[:, None, None], new, predicted)
                state = [
                    [torch.where(active[:, None], n, o) for n, o in zip(layer, old, strict=True)]
                    for layer, old in zip(moved, state, strict=True)
                ]
        return texts


@options_of(ConformerTransducer)
def conformer_transducer(
    vocabulary: Sequence[str], checkpoint: Weights = None, **options: float
) -> ConformerTransducer:
    """A transducer of these characters, with weights from a .safetensors file if one is given.

    Args:
        vocabulary: what each output stands for; the first is the blank.
        checkpoint: a file, or null to begin from scratch.
        **options: of ConformerTransducer.

    Raises:
        ConfigError: options that cannot be built.
        MissingFileError: no such checkpoint.
        AdapterFileError: a checkpoint that is damaged, or made for another model.
    """
    found = unknown(ConformerTransducer, options)
    require(conformer_transducer, {"checkpoint": checkpoint, **options}, found)
    return built(ConformerTransducer, vocabulary, checkpoint, options)
