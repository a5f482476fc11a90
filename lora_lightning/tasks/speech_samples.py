"""Samples for W&B: a few validation utterances to play, with what was heard before and after training."""

from __future__ import annotations

import torch
from lightning.pytorch.loggers import WandbLogger

from lora_lightning.data.speech import SAMPLE_RATE, SpeechBatch
from lora_lightning.tasks.recognizer import Recognizer

SAMPLES = 8
COLUMNS = ["id", "accent", "speaker", "audio", "said", "heard before", "heard after"]


class Samples:
    """The first validation utterances, heard now; `log` hears them again."""

    def __init__(self, task: Recognizer, batch: SpeechBatch) -> None:
        self.batch = SpeechBatch(*(part[:SAMPLES] for part in batch))  # type: ignore[arg-type]  # each in its place
        self.before = self._heard(task)

    def log(self, task: Recognizer) -> None:
        """A table with sound for every W&B logger of the task's Trainer."""
        import wandb

        waves = [w[:n].cpu().numpy() for w, n in zip(self.batch.waves, self.batch.lengths, strict=True)]
        sounds = [wandb.Audio(wave, sample_rate=SAMPLE_RATE) for wave in waves]
        texts = (self.batch.texts, self.before, self._heard(task))
        columns = (self.batch.ids, self.batch.accents, self.batch.speakers, sounds, *texts)
        for logger in task.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(
                    "samples", columns=COLUMNS, data=[list(row) for row in zip(*columns, strict=True)]
                )

    def _heard(self, task: Recognizer) -> list[str]:
        training = task.training
        task.eval()
        with torch.no_grad():
            heard = task.transcribe(self.batch.waves.to(task.device), self.batch.lengths.to(task.device))
        task.train(training)
        return heard


def samples_of(task: Recognizer) -> Samples | None:
    """Of the Trainer's data module, if there is one and W&B listens."""
    data = getattr(task.trainer, "datamodule", None)
    if data is None or not any(isinstance(logger, WandbLogger) for logger in task.loggers):
        return None
    return Samples(task, next(iter(data.val_dataloader())))
