"""Addresses: `hf:USER/NAME` and `wandb:ENTITY/PROJECT/NAME`, each in place of a folder. Loads little."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lora_lightning.errors import UserError

HUBS = {"hf": "the Hugging Face hub", "wandb": "Weights & Biases"}
FORMS = ("hf:USER/NAME[/FOLDER][@REVISION]", "wandb:ENTITY/PROJECT/NAME[:ALIAS]")
GIVE = f"give {' or '.join(FORMS)}."
WORD = r"(?!\.)[\w.-]+"  # of letters, digits, -, _ and ., which neither is nor begins as ".."
PATTERNS = {
    "hf": re.compile(rf"hf:({WORD}/{WORD})((?:/{WORD})*)(?:@({WORD}(?:/{WORD})*))?", re.ASCII),
    "wandb": re.compile(rf"wandb:({WORD}/{WORD}/{WORD})()(?::({WORD}))?", re.ASCII),
}
FIXED = {"hf": re.compile(r"[0-9a-f]{40}"), "wandb": re.compile(r"v\d+")}  # versions that never change
PAGE = re.compile(r"(?:hf://|https?://(?:www\.)?huggingface\.co/)([^/]+/[^/]+?)(?:/tree/([^/]+))?/?")


@dataclass(frozen=True)
class Address:
    """Where something is on a hub.

    Attributes:
        hub: a key of HUBS.
        name: USER/NAME, or ENTITY/PROJECT/NAME.
        folder: within the repository; empty is the repository itself.
        version: a revision or an alias; empty is the newest.
    """

    hub: str
    name: str
    folder: str = ""
    version: str = ""

    def __str__(self) -> str:
        mark = "@" if self.hub == "hf" else ":"
        folder = f"/{self.folder}" if self.folder else ""
        return f"{self.hub}:{self.name}{folder}" + (f"{mark}{self.version}" if self.version else "")

    @property
    def fixed(self) -> bool:
        """Whether its version stands for the same files for ever."""
        return FIXED[self.hub].fullmatch(self.version) is not None


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether this is meant as an address rather than as a path; `./hf:NAME` is a path."""
    text = os.fspath(path)
    return text.startswith(tuple(f"{hub}:" for hub in HUBS)) or PAGE.fullmatch(text) is not None


def address_of(path: str | os.PathLike[str]) -> Address:
    """The address that a text is.

    Raises:
        UserError: it has another form.
    """
    text = os.fspath(path)
    found = (p := PATTERNS.get(text.partition(":")[0])) and p.fullmatch(text)
    if not found or not text.isprintable():
        raise UserError(f"{text[:200]!r}: {address_problem(text)}")
    name, folder, version = found.groups()
    return Address(text.partition(":")[0], name, folder.strip("/"), version or "")


def address_problem(text: str) -> str:
    """What is wrong with an address, as a remedy; empty where nothing is."""
    pattern = PATTERNS.get(text.partition(":")[0])
    if pattern and pattern.fullmatch(text):
        return ""
    if page := PAGE.fullmatch(text):
        return f"{GIVE} Did you mean 'hf:{page[1]}{f'@{page[2]}' if page[2] else ''}'?"
    return GIVE
