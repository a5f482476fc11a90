"""What a hub says that it has: names, sizes and digests, by which files are fetched; and why it does not."""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import re
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_lightning.errors import UserError
from lora_lightning.utils.download import failure_text

SECONDS = 20.0  # for an answer, and for each piece of a file
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
T = TypeVar("T")


class UnreachableError(UserError):
    """A hub that does not answer now; what is in the cache may do."""


@dataclass(frozen=True)
class Digest:
    """A digest of a file, as its hub states it.

    Attributes:
        kind: "sha256", "git" (SHA-1 of git's blob), "md5" or "xxh128".
        value: hexadecimal.
    """

    kind: str
    value: str

    def begun(self, size: int) -> Any:
        """A hash object to be fed with the file's bytes."""
        if self.kind == "git":
            return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        if self.kind == "xxh128":
            return importlib.import_module("xxhash").xxh128()  # which wandb brings
        return hashlib.new(self.kind, usedforsecurity=False)


@dataclass(frozen=True)
class Remote:
    """A file of a hub.

    Attributes:
        pieces: begins to fetch it: its bytes in pieces.
    """

    name: str
    size: int
    digest: Digest
    pieces: Callable[[], Generator[bytes]]


@dataclass(frozen=True)
class Listing:
    """What an address stands for now.

    Attributes:
        version: what its version means now: a commit, `v3`.
        files: of those that were asked for, the ones that are there.
    """

    version: str
    files: dict[str, Remote]


def hexadecimal(text: str) -> str:
    """A digest of 16 bytes that W&B writes in base64; empty for anything else."""
    try:
        value = base64.b64decode(text, validate=True)
    except ValueError:
        return ""
    return value.hex() if len(value) == 16 else ""


def answered(call: Callable[[], T], seconds: float = 2 * SECONDS) -> T:
    """What a request returns or raises, within this time; it runs in a thread of its own, since looking up a
    host name has no timeout.

    Raises:
        UnreachableError: it takes longer.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:  # whatever a client raises is the caller's
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise UnreachableError(f"no answer within {seconds:g} s")
    return found[0]


def told(error: BaseException) -> str:
    """A client's own words on one line, without tokens, names in addresses and signed queries."""
    text = failure_text(error) if isinstance(error, Exception) else type(error).__name__
    for secret in filter(None, (os.environ.get(name, "").strip() for name in SECRETS)):
        text = text.replace(secret, "…")
    text = re.sub(r"\bhf_\w{6,}|\b[0-9a-f]{40,}\b|(?i:bearer|basic)\s+\S+", "…", text)
    return re.sub(r"(://)[^/\s@]+@|\?[^\s'\")]*", lambda found: found[1] or "", text)
