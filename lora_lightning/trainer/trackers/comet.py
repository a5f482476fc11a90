"""Comet: tables, pictures, sounds, confusion matrices and numbers of the whole run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.trainer.trackers.tracker import Confusion, Example, Tracker

CLASSES = 50  # of a confusion matrix that Comet draws


class CometTracker(Tracker):
    """Of Lightning's CometLogger."""

    shows = keeps = True

    @property
    def _offline(self) -> bool:
        return "Offline" in type(self.logger.experiment).__name__

    def where(self) -> str | None:
        experiment = self.logger.experiment
        if not self._offline:
            return f"Comet: {experiment.url}"
        file = Path(experiment.offline_directory) / f"{experiment.get_key()}*.zip"  # Comet adds letters
        return f"Comet runs offline. To upload it when it has ended: comet upload {file}"

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.logger.experiment.log_table(
            f"{name.replace('/', '_')}.csv", tabular_data=[list(row) for row in rows], headers=list(header)
        )

    def examples(self, name: str, examples: Sequence[Example]) -> None:
        if not examples:
            return
        experiment, first = self.logger.experiment, examples[0]
        for index, one in enumerate(examples):
            for state, picture in one.pictures.items():
                experiment.log_image(picture, name=f"{name}/{state}/{index:02}", metadata=dict(one.words))
            if one.sound is not None:
                sound = one.sound.cpu().numpy()
                experiment.log_audio(
                    sound, sample_rate=one.rate, file_name=f"{name}/{index:02}", metadata=dict(one.words)
                )
        self.table(name, ["name", *first.words], [[one.name, *one.words.values()] for one in examples])

    def confusion(self, name: str, found: Confusion) -> None:
        if len(found.names) > CLASSES:
            return super().confusion(name, found)
        self.logger.experiment.log_confusion_matrix(
            matrix=[list(row) for row in found.counts], labels=list(found.names),
            title=name, file_name=f"{name.replace('/', '_')}.json",
        )  # fmt: skip
        return None

    def files(
        self, name: str, files: Mapping[str, Path], aliases: Sequence[str], about: Mapping[str, Any]
    ) -> None:
        """An artifact; offline, where Comet has none, files of the experiment in a folder for each alias."""
        if self._offline:
            for alias in aliases:
                for target, file in files.items():
                    there = f"adapter/{alias}/{target}"
                    self.logger.experiment.log_asset(str(file), file_name=there, copy_to_tmp=True)
            return
        comet = importlib.import_module("comet_ml")
        artifact = comet.Artifact(name, "adapter", aliases=list(aliases), metadata=dict(about))
        for target, file in files.items():
            artifact.add(str(file), logical_path=target, copy_to_tmp=True)
        self.logger.experiment.log_artifact(artifact)

    def summary(self, values: Mapping[str, float]) -> None:
        self.logger.experiment.log_metrics(dict(values))

    def id(self) -> str | None:
        return self.logger.experiment.get_key()
