"""torchvision's downloads of data sets, shown as our own are: its bar puts control characters into files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lora_lightning.utils.download import megabytes
from lora_lightning.utils.libraries import loading

with loading("torchvision"):
    from torchvision.datasets import utils as theirs


class Download:
    """What torchvision asks of tqdm, of so many bytes."""

    def __init__(self, total: int | None, **_: object) -> None:
        self.bar = megabytes("the data set", total)

    def __enter__(self) -> Download:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)

    def update(self, count: int) -> None:
        """So many bytes have come."""
        self.bar.advance(count / 1e6)


@contextlib.contextmanager
def our_bar() -> Iterator[None]:
    """Meanwhile torchvision downloads with our bar in the place of its own."""
    before, theirs.tqdm = theirs.tqdm, Download
    try:
        yield
    finally:
        theirs.tqdm = before
