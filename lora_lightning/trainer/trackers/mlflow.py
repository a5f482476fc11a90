"""MLflow: tables and examples as artifacts of the run, which its page shows."""

from __future__ import annotations

import json
import shutil
import tempfile
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lightning.trainer.trackers.tracker import Example, Tracker


class MLflowTracker(Tracker):
    """Of Lightning's MLFlowLogger."""

    shows = keeps = True

    def where(self) -> str:
        uri = self.logger._tracking_uri
        local = uri.startswith(("sqlite:", "file:"))
        return f"MLflow: {uri}" + (f". To see it: mlflow ui --backend-store-uri {uri}" if local else "")

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A JSON file in the form of MLflow's own tables, without pandas, which those need."""
        whole = {"columns": list(header), "data": [list(row) for row in rows]}
        self.logger.experiment.log_dict(self.logger.run_id, whole, f"tables/{_plain(name)}.json")

    def examples(self, name: str, examples: Sequence[Example]) -> None:
        if not examples:
            return
        client, run, first = self.logger.experiment, self.logger.run_id, examples[0]
        with tempfile.TemporaryDirectory() as folder:
            for index, one in enumerate(examples):
                for state, picture in one.pictures.items():
                    picture.save(Path(folder) / f"{index:02}_{state}.png")
                if one.sound is not None:
                    _write_sound(Path(folder) / f"{index:02}.wav", one)
            client.log_artifacts(run, folder, _plain(name))
        self.table(name, ["name", *first.words], [[one.name, *one.words.values()] for one in examples])

    def files(
        self, name: str, files: Mapping[str, Path], aliases: Sequence[str], about: Mapping[str, Any]
    ) -> None:
        """A folder for each alias, with the files and `about.json`."""
        with tempfile.TemporaryDirectory() as folder:
            for target, file in files.items():
                shutil.copyfile(file, Path(folder) / target)
            (Path(folder) / "about.json").write_text(json.dumps({**about, "name": name}, indent=2))
            for alias in aliases:
                self.logger.experiment.log_artifacts(self.logger.run_id, folder, f"adapter/{alias}")

    def summary(self, values: Mapping[str, float]) -> None:
        self.logger.log_metrics(dict(values))

    def id(self) -> str | None:
        return self.logger.run_id


def _plain(name: str) -> str:
    return name.replace("/", "_")


def _write_sound(path: Path, one: Example) -> None:
    """One channel of 16 bits."""
    assert one.sound is not None
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(one.rate)
        file.writeframes((one.sound.cpu().clamp(-1, 1) * 32767).short().numpy().tobytes())
