"""A page of results: one file that needs no other, for a telephone, a wide screen, the dark and paper."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from lora_lightning.utils.atomic import write_whole

STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5b6875;--line:#d5dbe1;--ground:#fff;--card:#f5f7f9;
--now:#1f6feb;--then:#9aa5b1;--good:#1a7f4b;--bad:#c4321f;--heat:31,111,235}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#9fabb7;--line:#36414c;--ground:#14191f;
--card:#1d242c;--now:#58a6ff;--then:#6d7985;--good:#4cc38a;--bad:#ff7b6b;--heat:88,166,255}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--ground);
max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1rem 0 .25rem}
p{margin:.4rem 0;max-width:46rem}.soft,figcaption,small{color:var(--soft)}
.wide{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:top}
th{border-bottom:1px solid var(--line);font-weight:600}
td.number,th.number{text-align:right}td.number span{white-space:nowrap}
td.name{overflow-wrap:anywhere;min-width:4.5rem;max-width:20rem}
@media(min-width:30rem){td.number,th.number{white-space:nowrap}}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem 2rem}
figure{margin:0;min-width:0}svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
svg text{fill:var(--ink)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem;min-width:0;
break-inside:avoid}
.card img{display:block;width:100%;height:10rem;object-fit:contain;background:var(--ground)}
.card img.small{image-rendering:pixelated}
.card p{margin:.2rem 0;overflow-wrap:anywhere}
.bar{display:grid;grid-template-columns:minmax(0,1fr) 4rem 3rem;gap:.4rem;align-items:center;font-size:.85rem}
.bar span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar i{display:block;height:.55rem;background:var(--line);border-radius:2px;overflow:hidden}
.bar i b{display:block;height:100%;background:var(--now)}
.bar.then i b{background:var(--then)}.bar em{font-style:normal;text-align:right}
.rows{table-layout:fixed;width:100%;min-width:40rem}.rows td,.rows th{padding:2px}
.rows img{display:block;width:100%}.key i{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 1em}
.right{color:var(--good);font-weight:600}.wrong{color:var(--bad);font-weight:600}
summary{cursor:pointer;padding:.3rem 0}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--line:#bbb;--ground:#fff;--card:#fff;
--now:#1f6feb;--then:#9aa5b1;--good:#1a7f4b;--bad:#c4321f;--heat:31,111,235}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{max-width:none;font-size:11px}
.wide{overflow:visible}h2,h3{break-after:avoid}figure,tr{break-inside:avoid}}
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
LONGEST = 60  # characters of a name that are shown


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of these parts, whole or not at all.

    Args:
        title: a text.
        parts: HTML, in which every text is escaped.
    """
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts))
    write_whole(path, lambda file: Path(file).write_text(page, encoding="utf-8"))


def text(name: object, longest: int = LONGEST) -> str:
    """A text as HTML, shortened in the middle, on one line; names come from files and may hold anything."""
    plain = "".join(c if c.isprintable() else "\ufffd" for c in str(name))
    if len(plain) > longest:
        plain = f"{plain[: longest - longest // 3 - 1]}…{plain[-(longest // 3) :]}"
    return escape(plain)


def table(header: Sequence[object], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """A table that scrolls by itself where it is too wide; the first `left` columns are names."""

    def line(tag: str, cells: Sequence[object]) -> str:
        names = (f'<{tag} class="name">{text(cell)}</{tag}>' for cell in cells[:left])
        numbers = (f'<{tag} class="number">{_unbroken(text(cell))}</{tag}>' for cell in cells[left:])
        return f"<tr>{''.join((*names, *numbers))}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{line("th", header)}{body}</table></div>'


def _unbroken(cell: str) -> str:
    """An interval in brackets stays on one line."""
    return re.sub(r"\(.*?\)", lambda found: f"<span>{found[0]}</span>", cell)


def image(picture: Image.Image, alt: str, side: int = 256) -> str:
    """A picture within the page, no side longer than `side` pixels: small ones losslessly."""
    small = max(picture.size) <= 64
    if not small:
        picture = picture.copy()
        picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, style = ("png", ' class="small"') if small else ("jpeg", "")
    return f'<img{style} alt="{text(alt)}" src="data:image/{kind};base64,{data}">'
