"""Numbers of things in words."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 picture`, `2,000 pictures`: a number and a noun whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
