"""How often the weights of a layer were used."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Positions:
    """Where the weight of a layer was used in all batches: places of its inputs and of its outputs, and those
    between a kernel's columns and its rows."""

    inputs: int = 0
    between: int = 0
    outputs: int = 0

    def flops(self, size: int, place: str) -> int:
        """Of a weight of so many entries, a multiplication and an addition each."""
        # a table that is looked up has none
        return 0 if place == "looked up" else 2 * size * int(getattr(self, place))
