"""Lightning's CSV logger: tables as files beside metrics.csv."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lightning.trainer.trackers.tracker import Tracker
from lora_lightning.utils.atomic import write_whole


class CSVTracker(Tracker):
    """Of Lightning's CSVLogger."""

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def write(temporary: Any) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *rows])

        folder = Path(self.logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{name.replace('/', '_')}.csv", write)
