"""Runs the training application and ends it with a signal at a step: run by test_killed_recipes.py."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from lora_lightning.app.preemption import Preemption
from lora_lightning.app.train import train  # all that a run imports  # noqa: F401


def main(folder: Path, words: list[str], signal_number: int, step: int) -> None:
    """
    Args:
        step: the training batch, counted from 1, whose begin the signal comes with; 0: none.
    """
    from lora_lightning.app.application import main as application

    os.chdir(folder)
    sys.stdout = sys.stderr = open("log.txt", "a")  # noqa: SIM115
    torch.set_num_threads(1)
    left = [step]

    def on_train_batch_start(self: pl.Callback, *_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal_number)

    Preemption.on_train_batch_start = on_train_batch_start
    application([*words, "trainer.enable_progress_bar=false"])
