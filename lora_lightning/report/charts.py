"""Charts of a page: Vega-Lite specifications, which the page's one script draws, and that script."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARIES = ("vega/vega.min.js", "vega/vega-lite.min.js", "charts.js")
MARK = '<figure class="chart">'
DIGITS = 6  # of a number, significant


def chart(spec: Mapping[str, Any], label: str, least: int = 0, widest: int = 0) -> str:
    """A chart as HTML: drawn as wide as its place is, with tooltips, and with its data as a table below.

    Colours are the page's, `"var(--now)"` for one and the category range by itself, so that they hold in the
    dark and on paper; shade by opacity, since Vega cannot mix them.

    Args:
        spec: a Vega-Lite specification, its data inline as `{"data": {"values": [...]}}`; `width` is the
            place's unless it says otherwise. NaN and infinities become null.
        label: what the chart shows, for those who cannot see it.
        least: pixels of width below which it scrolls in itself.
        widest: pixels that it is not wider than; 0 is as wide as its place.
    """
    style = f"min-width:{least}px;" * bool(least) + f"max-width:{widest}px" * bool(widest)
    return (
        f'{MARK}<div class="wide"><div class="plot" role="img" aria-label="{escape(label)}" style="{style}">'
        f'{escape(label)}</div></div><script type="application/json">{embedded(compact(spec))}</script>'
        "<details><summary>as a table</summary></details></figure>"
    )


def embedded(value: Any) -> str:
    """JSON that may stand within a script element, whatever its texts hold."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )


def compact(part: Any) -> Any:
    """A specification with rows by columns, which the script makes rows again, and with short numbers."""
    if isinstance(part, Mapping):
        values = part.get("values")
        if (
            set(part) == {"values"}
            and isinstance(values, list)
            and all(isinstance(v, Mapping) for v in values)
        ):
            names = dict.fromkeys(name for row in values for name in row)
            columns = {str(name): [compact(row.get(name)) for row in values] for name in names}
            return {"columns": columns, "length": len(values)}
        return {str(key): compact(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [compact(value) for value in part]
    if hasattr(part, "item"):  # a number of NumPy or torch
        part = part.item()
    if isinstance(part, float):
        return float(f"{part:.{DIGITS}g}") if math.isfinite(part) else None
    return part


def scripts() -> list[str]:
    """The libraries and what draws with them, each to stand in an element of a page."""
    texts = ((HERE / name).read_text(encoding="utf-8") for name in LIBRARIES)
    return ["\n".join(x for x in t.splitlines() if not x.startswith("//# sourceMappingURL")) for t in texts]
