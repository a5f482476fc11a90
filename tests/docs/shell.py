"""The commands of a shell block, each with the output that the page shows under it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

COMMENT = re.compile(r"""((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*?)(?:(?:^|(?<=\s))#.*)?$""")
SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
ASSIGNMENT = re.compile(r"[A-Z_]+=")
BETWEEN = "&;|"


@dataclass(frozen=True)
class Command:
    """One command of a shell.

    Args:
        words: without assignments of variables before it.
        shown: the output that the page shows; None where it shows none.
    """

    words: tuple[str, ...]
    shown: str | None = None

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands_of(source: str, console: bool) -> Iterator[Command]:
    """The commands of a block.

    Args:
        console: its commands stand after `$ `, their outputs below them.
    """
    if not console:
        for line in _lines(source):
            yield from _parted(line)
        return
    for part in re.split(r"^\$ ", source, flags=re.MULTILINE)[1:]:
        text = part.replace("\\\n", " ")
        line, _, shown = text.partition("\n")
        *before, last = _parted(_without_comment(line))
        yield from before
        yield Command(last.words, shown if shown.strip() else None)


def _lines(source: str) -> Iterator[str]:
    for line in source.replace("\\\n", " ").splitlines():
        if text := _without_comment(line).strip():
            yield text


def _without_comment(line: str) -> str:
    found = COMMENT.match(line)
    return found[1] if found else line


def _parted(line: str) -> Iterator[Command]:
    """The commands of a line, those in `$(…)` too."""
    for inner in SUBSTITUTION.findall(line):
        yield from _parted(inner)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=BETWEEN)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and not set(word) - set(BETWEEN):
            while words and ASSIGNMENT.match(words[0]):
                words.pop(0)
            if words and words[0] != "eval":
                yield Command(tuple(words))
            words = []
        else:
            words.append(word)
