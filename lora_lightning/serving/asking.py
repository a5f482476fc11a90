"""A request and what is told of it, as they go from the server to its workers and back; without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ABOUT = "about"  # asks which of the kinds the base answers


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        adapter: its name; None is the base.
        kind: what is asked: "classify", "detect", "segment" or "transcribe"; or `ABOUT`.
        options: of the kind, checked.
        until: when nobody waits for the answer any more, by `time.monotonic()`; None waits for ever.
    """

    adapter: str | None
    kind: str
    body: bytes
    options: dict[str, Any] = field(default_factory=dict)
    until: float | None = None


@dataclass(frozen=True)
class Event:
    """What is told of a request: parts of the answer, and at the end the answer or an error.

    Attributes:
        what: "part", "answer" or "error".
        status: of HTTP.
        batch: how many ran together with it, itself among them.
    """

    what: str
    content: dict[str, Any]
    status: int = 200
    batch: int = 0


Tell = Callable[[Event], None]
