"""Tables in plain text: what is adapted, and how runs compare."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # but tabs and line ends


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns under a header and a rule; columns of numbers stand to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(_is_number(r[i]) for r in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("─" * w for w in widths), *map(line, cells)])


def _is_number(cell: str) -> bool:
    return re.match(r"^[-+±≤≥]?[\d,.]", cell) is not None or cell in ("", "-", "–")


def percent(part: float, whole: float) -> str:
    """`0.41 %`, two significant digits below 10 %."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.3g} %" if share >= 0.01 else f"{share:.1g} %"


def span(values: Sequence[float], form: str) -> str:
    """`3` or `3 … 8`: the least and the greatest of the values, written by the form."""
    if not values:
        return ""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} … {high}"


ROOT = "the model itself"  # in messages and tables, where its name is ""


def printable(page: str) -> str:
    """With control characters, which a terminal obeys, written out as Python writes them."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], page)


def truncate_list(names: Sequence[str], most: int = 4) -> str:
    """`a, b, c, d and 12 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or ROOT for name in names[:most]) + more
