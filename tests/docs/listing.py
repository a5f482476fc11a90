"""What is done to each block of the documentation: `python tests/docs/listing.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blocks import PAGES, blocks_of, name_of
from commands import treatment_of
from reader import ASKS, KINDS, SHELLS
from shell import commands_of

COMPOSED = ("@package _global_", "class_path")  # a recipe; a configuration of LightningCLI
DONE = {"python": "executed", "text": "compared", "csv": "read", "diff": "applied"}


def entries_of(page: Path) -> Iterator[tuple[int, str, str]]:
    """Of each block, and of each command in it: line, what it is, what is done to it.

    Raises:
        LookupError: a block or a command is of no known kind.
    """
    for line, block in blocks_of(page):
        if block.language not in KINDS:
            raise LookupError(f"{name_of(page)}:{line}: no reader knows what to do with {block.language!r}")
        if block.language not in SHELLS:
            hidden = " in a comment" * block.hidden
            composed = "composed" if any(sign in block.source for sign in COMPOSED) else "read"
            done = "compiled: asks a server" if ASKS in block.source else DONE.get(block.language, composed)
            yield line, f"{block.language}{hidden}", done
            continue
        for command in commands_of(block.source, block.language == "console"):
            yield line, str(command), treatment_of(command).name


if __name__ == "__main__":
    for page in PAGES:
        for line, what, done in entries_of(page):
            print(f"{name_of(page)}:{line}: {done:<12} {what}")
