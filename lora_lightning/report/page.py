"""A page of results: one file that needs no other, for a telephone, a wide screen, the dark and paper."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lightning.errors import UserError
from lora_lightning.report import charts
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.mapping_file import read_values

if TYPE_CHECKING:
    from PIL import Image

STYLE = Path(__file__).with_name("style.css")
SLIDER = Path(__file__).with_name("threshold.js")  # the one script that stands within a section
PAGE_FILE, KEPT = "report.html", "report/sections.json"  # in a run's folder

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
{script}
</body>
</html>
"""
LONGEST = 60  # characters of a name that are shown
HEADING = 200  # of a heading
MANY = 4  # sections, from which on a page has a list of them
MOST_KEPT = 256 * 2**20  # bytes of all that a task has left
DELETE = "Delete it, and the page is made without it."


class Html(str):
    """A text that is HTML already, in which every text is escaped."""


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, a text, and under it HTML in which every text is escaped."""

    title: str
    html: str


def write_page(path: Path, title: str, sections: Sequence[Section], lead: str = "") -> None:
    """Write a page of these sections, whole or not at all.

    Args:
        title: a text.
        lead: HTML between the title and the first heading, in which every text is escaped.
    """
    body = "\n".join([lead, _contents(sections), *(_headed(i, one) for i, one in enumerate(sections))])
    drawn = charts.scripts() if charts.MARK in body else []
    slides = [SLIDER.read_text(encoding="utf-8")]
    style = STYLE.read_text(encoding="utf-8")
    page = PAGE.format(
        title=text(title, HEADING),
        policy=_policy([*drawn, *slides]),
        style=style,
        body=body,
        script="\n".join(f"<script>{one}</script>" for one in drawn),
    )
    # half of a surrogate pair, which JSON may hold and UTF-8 may not, becomes "?"
    write_whole(path, lambda file: Path(file).write_text(page, encoding="utf-8", errors="replace"))


def _policy(scripts: Sequence[str]) -> str:
    """What a browser lets the page do: run these scripts and no others, whatever stands in its sections, and
    load nothing. Vega makes functions of what a chart says, in its own small language."""
    digests = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )


def _headed(number: int, section: Section) -> str:
    return (
        f'<section id="part-{number}">\n<h2>{text(section.title, HEADING)}</h2>\n{section.html}\n</section>'
    )


def _contents(sections: Sequence[Section]) -> str:
    """Links to the sections, where there are several screens of them."""
    links = (f'<a href="#part-{i}">{text(one.title)}</a>' for i, one in enumerate(sections))
    return f'<nav aria-label="Contents">{" ".join(links)}</nav>' if len(sections) >= MANY else ""


def leave(folder: Path, sections: Sequence[Section], title: str = "Results") -> None:
    """Leave sections in a run's folder for its page, as `report/sections.json`; and as report.html until the
    run makes that page, or where there is no run.

    Args:
        title: of the page that these sections alone make.
    """
    (folder / KEPT).parent.mkdir(parents=True, exist_ok=True)
    found = json.dumps({"title": title, "sections": [asdict(section) for section in sections]})
    write_whole(folder / KEPT, lambda file: Path(file).write_text(found, encoding="utf-8"))
    write_page(folder / PAGE_FILE, title, sections)


def left(folder: Path) -> tuple[str, list[Section]]:
    """What `leave` has left in a folder: the title and the sections; nothing where there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    if not (folder / KEPT).is_file():
        return "", []
    found = read_values(folder / KEPT, DELETE, MOST_KEPT)
    try:
        return str(found["title"]), [Section(str(s["title"]), str(s["html"])) for s in found["sections"]]
    except (TypeError, KeyError):
        raise UserError(f"{folder / KEPT} is damaged: it holds no title and sections. {DELETE}") from None


def text(name: object, longest: int = LONGEST) -> str:
    """A text as HTML, shortened in the middle, on one line; names come from files and may hold anything."""
    if isinstance(name, Html):
        return name
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
    address, small = address_of(picture, side)
    style = ' class="small"' if small else ""
    return f'<img{style} alt="{text(alt)}" src="{address}">'


def address_of(picture: Image.Image, side: int) -> tuple[str, bool]:
    """A picture as an address that holds all of it, and whether it is small and kept losslessly."""
    small = max(picture.size) <= 64
    if not small:
        picture = picture.copy()
        picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small
