"""Counts Python calls: how long a way through the code is, which is the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def walked(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """File and name of every Python function that a call of `function` passes, in order. Not those of torch's
    own wrapper of an autograd function, which differs from version to version."""
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return [call for call in calls[1:] if not call[0].endswith(WRAPPERS) and call[1] not in WRAPPING]


WRAPPING = ("Function.apply", "_is_setup_context_defined")
WRAPPERS = ("torch/_functorch/utils.py", "torch/_functorch/pyfunctorch.py")
