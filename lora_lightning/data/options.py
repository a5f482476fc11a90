"""Options that several data modules have, each declared once: types with their marks."""

from __future__ import annotations

from typing import Annotated

from lora_lightning.utils.marks import at_least, between, path

BatchSize = Annotated[int, at_least(1)]
Count = Annotated[int, at_least(1)]  # of samples
Folder = Annotated[str, path()]
Seed = Annotated[int, between(0, 2**32 - 1)]  # what every generator takes
Workers = Annotated[int | None, at_least(0)]
