"""What of a run travels with its weights: how its model is built again, and what data and task have said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningDataModule, LightningModule

from lora_lightning.files.origin import Origin


def origin_of(
    recipe: str, config: Mapping[str, Any], data: LightningDataModule, task: LightningModule
) -> Origin:
    """After the test of a run, in which task and data learn the last of it.

    Args:
        recipe: its name.
        config: of the run, resolved to plain values.
    """
    return Origin.of_run(recipe, config, facts_of(data, task))


def facts_of(data: LightningDataModule, task: LightningModule) -> dict[str, Any]:
    """What data say of themselves (`provides`), what they do to a picture (`preprocessing()`), and what the
    task has found out (`facts()`), where they have these."""
    facts = dict(getattr(data, "provides", {}))
    for owner, name in ((data, "preprocessing"), (task, "facts")):
        if callable(asked := getattr(owner, name, None)):
            facts |= asked()
    return facts
