"""TensorBoard: tables as text, examples as pictures and sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_lightning.trainer.trackers.tracker import Example, Tracker, as_markdown


class TensorBoardTracker(Tracker):
    """Of Lightning's TensorBoardLogger."""

    shows = True

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.logger.experiment.add_text(name, as_markdown(header, rows))

    def examples(self, name: str, examples: Sequence[Example]) -> None:
        """Pictures of each state under one name, the words as a table, sounds."""
        if not examples:
            return
        writer, first = self.logger.experiment, examples[0]
        for state in first.pictures:
            stack = np.stack([np.asarray(one.pictures[state].convert("RGB")) for one in examples])
            writer.add_images(f"{name}/{state}", stack, dataformats="NHWC")
        for index, one in enumerate(examples):
            if one.sound is not None:
                writer.add_audio(f"{name}/{index}", one.sound.cpu()[None], sample_rate=one.rate)
        self.table(
            f"{name}/words", ["name", *first.words], [[one.name, *one.words.values()] for one in examples]
        )

    def summary(self, values: Mapping[str, float]) -> None:
        """Also the number by which its page of hyperparameters compares runs."""
        first = next(iter(values.values()), None)
        told = dict(values) if first is None else {**values, "hp_metric": first}
        self.logger.log_metrics(told, 0)
