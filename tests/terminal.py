"""What a terminal shows of the characters that it is sent."""

import io
import re
import sys
from typing import NamedTuple

TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+")


class Seen(NamedTuple):
    """Attributes:
    lines: what stands on the screen in the end.
    frames: each state of a line before it was erased, without those that were empty.
    """

    lines: list[str]
    frames: list[str]


def seen(text: str) -> Seen:
    """Knows line ends, carriage returns, the erasure of a line, and colours, which it drops; nothing else."""
    lines, frames, column = [""], [], 0
    for token in TOKENS.findall(text):
        if token == "\n":
            lines.append("")
            column = 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            frames.append(lines[-1])
            lines[-1] = ""
        elif token.startswith("\x1b["):
            assert token.endswith("m"), f"{token!r}: what does a terminal do with it?"
        else:
            line = lines[-1].ljust(column)
            lines[-1] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return Seen(lines, [frame for frame in frames if frame])


class Terminal(io.StringIO):
    """A stream that is taken for a terminal; in a `with` block it is standard output and error."""

    def isatty(self) -> bool:
        return True

    def __enter__(self) -> "Terminal":
        self.before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = self
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self.before


def beside_progress(text: str) -> str:
    """What else stands in a file to which progress has written lines."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r"(\d trained|\d/s|s each)$", line.rstrip("\n")))
