"""SpeechRecognizer: CTC loss and error rates for any model that maps speech to characters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.text import CharErrorRate, WordErrorRate

from lora_lightning.data.speech import SpeechBatch
from lora_lightning.methods.optimizers import head_parameters
from lora_lightning.tasks.error_rates import Interval, Transcript, error_rate
from lora_lightning.tasks.optim import configured
from lora_lightning.tasks.optim_config import OptimConfig, OptimOptions
from lora_lightning.tasks.recognizer import Recognizer
from lora_lightning.tasks.reporting import BEFORE
from lora_lightning.tasks.routing import report_together
from lora_lightning.tasks.scores import Score
from lora_lightning.tasks.speech_examples import confusion_of, examples_of
from lora_lightning.tasks.speech_report import Heard, report
from lora_lightning.tasks.vocabulary import BLANK, VOCABULARY, Decoder, encode, greedy
from lora_lightning.trainer.trackers.tracker import Confusion, Example
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import TEXT, listed


class SpeechRecognizer(Recognizer):
    """Trains `model` by CTC (Graves et al. 2006) on batches of utterances, `SpeechBatch`.

    Logs train/loss, val/loss, val/wer, val/cer, test/loss, test/wer and test/cer, error rates as fractions
    of all words and characters. Utterances of the accents `kept` in those batches count for val/wer_ACCENT
    and test/wer_ACCENT alone.

    Args:
        model: (waves (batch, samples), lengths (batch,)) -> (logits (batch, frames, vocabulary), lengths
            of each in frames (batch,)).
        vocabulary: what each output stands for: first the blank, then characters, of which " " or "|"
            is the space; entries of several characters are never decoded.
        optim: the optimizer's options, also as a plain mapping; None takes the defaults.
        kept: accents that are validated and tested beside those of the training data.
        decoder: (log-probabilities (batch, frames, vocabulary), lengths (batch,), vocabulary) -> texts, such
            as `lora_lightning.tasks.decoding.BeamDecoder`; None takes the best output of each frame.

    Attributes:
        transcripts: what the last validation or test has heard, in the order of the data.
        heard: the same of the last test, by the state of the model: "before" training, and
            `now`, or that alone where it has no adapter or is not asked without it.

    Raises:
        ConfigError: one line for each bad option.
    """

    def __init__(
        self,
        model: nn.Module,
        vocabulary: Annotated[Sequence[str], VOCABULARY],
        optim: OptimOptions = None,
        kept: Annotated[Sequence[str], listed("a list of accents", TEXT, least=0)] = (),
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        require(SpeechRecognizer, locals())
        vocabulary = list(vocabulary)
        self.model = model
        self.vocabulary = vocabulary
        self.optim = OptimConfig.of(optim)
        self.kept = list(kept)
        self.scores = (*self.scores, *(Score(f"wer_{a}", f"{a} WER %", best="min") for a in self.kept))
        self.decoder = decoder
        # Plain types, so that the checkpoint loads with weights_only=True.
        self.save_hyperparameters(
            {"vocabulary": vocabulary, "optim": self.optim.to_dict(), "kept": self.kept}
        )
        self.rates = nn.ModuleDict({
            stage: nn.ModuleDict(
                {"wer": WordErrorRate(), "cer": CharErrorRate()}
                | {f"wer_{accent}": WordErrorRate() for accent in self.kept}
            )
            for stage in ("val_rates", "test_rates")
        })  # fmt: skip
        self.transcripts: list[Transcript] = []
        self.heard: dict[str, list[Transcript]] = {}

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (batch, frames, vocabulary) and lengths in frames (batch,)."""
        logits, frames = self.model(waves, lengths)
        return logits.float().log_softmax(-1), frames

    def transcribe(self, waves: Tensor, lengths: Tensor) -> list[str]:
        """What is said in waves (batch, samples) of these lengths."""
        return self.decode(*self(waves, lengths))

    def decode(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """Texts of log-probabilities (batch, frames, vocabulary) of these lengths in frames."""
        return (self.decoder or greedy)(log_probs, lengths, self.vocabulary)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        loss = self.batch_loss(batch)
        self.log("train/loss", loss, batch_size=len(batch.lengths))
        return loss

    def batch_loss(self, batch: SpeechBatch) -> Tensor:
        """What is trained to be small."""
        log_probs, frames = self(batch.waves, batch.lengths)
        return self.loss(log_probs, frames, batch)

    def predict_and_loss(self, batch: SpeechBatch) -> tuple[list[str], Tensor]:
        """What the model hears in a batch, and its loss, by one forward."""
        log_probs, frames = self(batch.waves, batch.lengths)
        return self.decode(log_probs, frames), self.loss(log_probs, frames, batch)

    def loss(self, log_probs: Tensor, frames: Tensor, batch: SpeechBatch) -> Tensor:
        """CTC loss a character, averaged over the utterances. One whose text needs more frames than it
        has cannot be aligned and counts as 0: data modules look for those before training."""
        targets, lengths = encode(batch.texts, batch.ids, self.vocabulary)
        targets, lengths = targets.to(log_probs.device), lengths.to(log_probs.device)
        return F.ctc_loss(
            log_probs.transpose(0, 1), targets, frames, lengths, blank=BLANK, zero_infinity=True
        )

    def on_validation_epoch_start(self) -> None:
        self.transcripts = []

    def on_test_epoch_start(self) -> None:
        self.transcripts = []
        both = self.pictured and self.has_before()
        self.heard = {**({BEFORE: []} if both else {}), self.now: self.transcripts}

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)
        if BEFORE in self.heard:
            with self.as_before():
                self.heard[BEFORE] += _transcripts(batch, self.transcribe(batch.waves, batch.lengths))

    def _evaluate(self, stage: str, batch: SpeechBatch) -> None:
        heard, loss = self.predict_and_loss(batch)
        rates: Any = self.rates[f"{stage}_rates"]
        for accent, said, text in zip(batch.accents, batch.texts, heard, strict=True):
            names = [f"wer_{accent}"] if accent in self.kept else ["wer", "cer"]
            for name in names:
                rates[name].update([text], [said])
        self.transcripts += _transcripts(batch, heard)
        size = len(heard)
        self.log(f"{stage}/loss", loss, batch_size=size, sync_dist=True)
        for name, rate in rates.items():
            if not rate.update_called and self.trainer.world_size == 1:
                continue  # no utterance of that accent yet; several processes must log alike
            self.log(f"{stage}/{name}", rate, on_epoch=True, batch_size=size, prog_bar=name == "wer")

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The interval of each score of the last test, that covers it with a probability of 95 %."""
        return {name: (found.low, found.high) for name, found in self._rates_of(self.transcripts).items()}

    def before(self) -> dict[str, Any]:
        """Scores and intervals of the same test before training, for the head of the run's page; empty where
        nobody knows them."""
        found = self._rates_of(self.heard.get(BEFORE, ()))
        if not found:
            return {}
        return {
            "scores": {name: one.rate for name, one in found.items()},
            "intervals": {name: (one.low, one.high) for name, one in found.items()},
        }

    def _rates_of(self, transcripts: Sequence[Transcript]) -> dict[str, Interval]:
        """Of each score: those of an accent that is kept of it alone, the others of all the rest."""
        found = {}
        for score in self.scores:
            name, _, accent = score.name.partition("_")
            heard = [t for t in transcripts if (t.accent == accent if accent else t.accent not in self.kept)]
            if heard:
                found[score.name] = error_rate(heard, "word" if name == "wer" else "character")
        return found

    def confusion(self) -> Confusion | None:
        """Which words the last test heard as which, of those that it got wrong most often, for trackers."""
        return confusion_of(self.transcripts) if self.heard else None

    def report(self, data: Any, folder: str | os.PathLike[str]) -> list[str]:
        """Tables by accent, and report.html, of what the last test has heard; `data.test_set` has the
        utterances.

        Returns:
            Lines to print; none before a test.
        """
        if not (self.transcripts and self.heard):
            return []
        return report(self, data.test_set, self.heard, Path(folder))

    def examples(self, data: Any, most: int) -> list[Example]:
        """Test utterances of the last test to play, with what was heard before (if the model is adapted) and
        after training."""
        return examples_of(self.heard, self.kept, data.test_set, most) if self.heard else []

    def report_together(
        self, data: dict[str, Any], folder: str | os.PathLike[str], tested: Mapping[str, Heard] | None = None
    ) -> list[str]:
        """The test utterances of several data modules by all adapters of this model, routed.

        Args:
            data: by the adapter's name.
            tested: the `heard` of each adapter's own test, which is not heard again.
        """
        return report_together(self, data, Path(folder), tested or {})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configured(self, head_parameters(self.model), self.optim)


def _transcripts(batch: SpeechBatch, heard: Sequence[str]) -> list[Transcript]:
    rows = zip(batch.ids, batch.accents, batch.speakers, batch.texts, heard, strict=True)
    return [Transcript(*row) for row in rows]
