"""Words in the cells of a CSV, which spreadsheets take for formulas where they begin like one."""

from __future__ import annotations

import contextlib

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe_cell(text: str) -> str:
    """A word with an apostrophe before it where a spreadsheet would evaluate it, as OWASP advises: quotes do
    not help, since a CSV's reader takes them off first. Numbers stay as they are."""
    if not text.startswith(FORMULA):
        return text
    with contextlib.suppress(ValueError):
        float(text)
        return text
    return f"'{text}"


def safe_path(path: str) -> str:
    """A relative path that begins so: the same file, from `./`."""
    return f"./{path}" if path.startswith(FORMULA) else path
