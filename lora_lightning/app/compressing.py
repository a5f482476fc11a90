"""A task's network made smaller by what its training data show: for `compress=` of a run and the command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L

from lora_lightning.app.compress_options import BATCHES, BUDGETS
from lora_lightning.app.training_inputs import training_inputs
from lora_lightning.compression.compress import compress
from lora_lightning.compression.result import Compressed


def compress_task(task: Any, data: L.LightningDataModule, options: Mapping[str, Any]) -> Compressed:
    """Make the network of a task smaller, in place, by the first batches of its training data.

    Args:
        task: has a `model`, which its `training_step` calls as a whole.
        options: one of BUDGETS, and `batches`.

    Raises:
        UserError, ConfigError: as `compress`.
    """
    budgets: dict[str, Any] = {name: options.get(name) for name in BUDGETS}
    given = training_inputs(task, data, int(options.get("batches") or BATCHES), "compress")
    return compress(task.model, data=given, **budgets)
