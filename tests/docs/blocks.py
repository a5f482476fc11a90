"""The pages of the documentation, and their blocks in the order in which they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pages import ROOT, pages
from sybil import Document, Region
from sybil.parsers.abstract.lexers import LexerCollection
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

PAGES = pages()
FENCE = re.compile(r"[ \t]*(?P<info>[^\n]*)$\n", re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')
LEXERS = LexerCollection(
    [
        RawFencedCodeBlockLexer(FENCE),
        DirectiveInHTMLCommentLexer(
            r"invisible-code-block", r"\w+", {"arguments": "info", "source": "source"}
        ),
    ]
)


@dataclass(frozen=True)
class Block:
    """What stands between fences, or in a comment that sybil reads.

    Args:
        language: the first word after the fence; empty without one.
        title: the file that it is said to be, by `title="FILE"` after the language.
        hidden: stands in a comment of the page's source.
    """

    language: str
    title: str | None
    source: str
    hidden: bool


def name_of(page: Path) -> str:
    """`docs/adapters.md`."""
    return page.relative_to(ROOT).as_posix()


def document_of(page: Path) -> Document:
    """The page with its blocks: `examples()` has them, a Block each as `parsed`."""
    return Document.parse(str(page), _blocks)


def blocks_of(page: Path) -> Iterator[tuple[int, Block]]:
    """Each block with its line."""
    return ((example.line, example.parsed) for example in document_of(page).examples())


def _blocks(document: Document) -> Iterable[Region]:
    for region in LEXERS(document):
        info = str(region.lexemes["info"]).strip()
        title = TITLE.search(info)
        hidden = document.text[region.start : region.end].lstrip().startswith("<!--")
        language = info.split()[0].strip("{}.") if info else ""
        region.parsed = Block(language, title and title[1], region.lexemes["source"], hidden)
        yield region
