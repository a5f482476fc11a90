"""The section `compress` of a run: its options, and what is wrong with them before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lightning.utils.marks import Check, above, at_least, number, show, whole

BUDGETS = ("parameters", "flops", "latency", "energy")  # of which one is given
BATCHES = 8  # of the training data
SHARE = number(above(0, below=1, note="0.5 is half")).or_null()
CHECKS: dict[str, Check] = {**dict.fromkeys(BUDGETS, SHARE), "batches": whole(at_least(1))}


def compress_problems(section: Any) -> list[str]:
    """What does not go together in it."""
    if not isinstance(section, Mapping):
        return []
    given = [f"compress.{name}={show(section[name])}" for name in BUDGETS if section.get(name) is not None]
    return [f"{' and '.join(given)}: give one of these."] if len(given) > 1 else []
