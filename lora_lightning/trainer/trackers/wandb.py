"""Weights & Biases: tables, examples with pictures and sounds, confusion matrices, a summary."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lightning.trainer.trackers.tracker import Confusion, Example, Tracker

CLASSES = 50  # of a confusion matrix that W&B draws


class WandbTracker(Tracker):
    """Of Lightning's WandbLogger."""

    shows = keeps = True

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.logger.log_table(name, columns=list(header), data=[list(row) for row in rows])

    def examples(self, name: str, examples: Sequence[Example]) -> None:
        """One table: pictures side by side at one size, and sounds to play."""
        if not examples:
            return
        wandb = importlib.import_module("wandb")
        first = examples[0]
        sounds = ["sound"] if first.sound is not None else []
        rows = []
        for one in examples:
            pictures = [wandb.Image(one.pictures[state]) for state in first.pictures]
            played = [wandb.Audio(one.sound.cpu().numpy(), sample_rate=one.rate) for _ in sounds]  # type: ignore[union-attr]  # all have one
            rows.append([one.name, *pictures, *played, *(one.words[word] for word in first.words)])
        titles = ["picture" if state == "picture" else f"picture, {state}" for state in first.pictures]
        self.table(name, ["name", *titles, *sounds, *first.words], rows)

    def confusion(self, name: str, found: Confusion) -> None:
        if len(found.names) > CLASSES:
            return super().confusion(name, found)
        wandb = importlib.import_module("wandb")
        cells = [
            [true, said, count]
            for true, row in zip(found.names, found.counts, strict=True)
            for said, count in zip(found.names, row, strict=True)
        ]
        columns = ["Actual", "Predicted", "nPredictions"]  # of W&B's own chart, which counts samples itself
        chart = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns, cells),
            {column: column for column in columns},
            {"title": name},
        )
        self.logger.experiment.log({name: chart})
        return None

    def summary(self, values: Mapping[str, float]) -> None:
        self.logger.experiment.summary.update(dict(values))

    def hide(self, prefix: str) -> None:
        step = "trainer/global_step"  # as Lightning's logger has it of all others
        self.logger.experiment.define_metric(f"{prefix}*", step_metric=step, hidden=True)

    def id(self) -> str | None:
        return self.logger.experiment.id
