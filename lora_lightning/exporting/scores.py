"""What the test of an exported file has given, in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lora_lightning.exporting.card import CARD, ExportCard, card_of
from lora_lightning.exporting.folder import FACTS
from lora_lightning.exporting.formats import FORMATS
from lora_lightning.utils.atomic import write_together


def add_scores(folder: Path, about: ExportCard, scores: Mapping[str, float]) -> None:
    """Put scores of the file into `export.json`, and a new card beside it.

    Args:
        folder: that `export` has written.
        about: with the scores in its table.
        scores: by name.

    Raises:
        WriteError: the folder cannot be written.
    """
    told = json.loads((folder / FACTS).read_text(encoding="utf-8")) | {"scores": dict(scores)}
    form = FORMATS[told["format"]]
    card = card_of(about, told, form.title, " ".join(form.needs))
    facts = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    write_together(
        {
            folder / CARD: lambda file: Path(file).write_text(card, encoding="utf-8"),
            folder / FACTS: lambda file: Path(file).write_text(facts, encoding="utf-8"),
        }
    )
