"""Which adapters a server has, by name: the sub-folders of a folder, as they are now."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from lora_lightning.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
FILES = ("adapter_config.json", "adapter_model.safetensors")
IN_RUN = "adapter"  # the adapter's folder in a run's
BASE = "base"  # names the base in the place of an adapter
FRESH = 1.0  # seconds for which what was listed is taken as it was
LEAST = 0.1  # seconds between two listings, however many unknown names are asked for
SHOWN = 60  # characters of a name that was asked for


class UnknownAdapter(UserError):
    """A request names an adapter that there is not."""


class UnusableAdapter(UserError):
    """An adapter that is there and cannot be used; the message says nothing of where it lies."""


class Catalog:
    """Names and the folders that they mean. A name is letters, digits, `.`, `_` and `-`, and means one of the
    folders that were found: no path is made of it. For several threads.

    Args:
        folder: whose sub-folders are adapters, or runs with an adapter; None has none.
        fixed: further names that stay.
    """

    def __init__(self, folder: Path | None = None, fixed: Mapping[str, Path] | None = None) -> None:
        self.root, self.fixed = folder, dict(fixed or {})
        self._lock = threading.Lock()
        self._found: dict[str, Path] = {}
        self._at, self._took = -FRESH, 0.0  # when what was found was begun to be listed, and seconds of it
        self._warned = False

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.listed())

    def listed(self) -> Mapping[str, Path]:
        """Names and folders. Another mapping only where they were listed anew."""
        return self._now(FRESH)

    def gone(self, name: str, folder: Path) -> bool:
        """Whether an adapter was removed since it was listed; not, where the whole shelf is away."""
        if self.root is None or name in self.fixed:
            return False
        try:
            os.stat(folder / FILES[0])
        except (FileNotFoundError, NotADirectoryError):
            return os.path.isdir(self.root)
        except OSError:
            pass
        return False

    def folder(self, name: str) -> Path:
        """What a name means.

        Raises:
            UnknownAdapter: no name, or there is none of this name.
        """
        return self._place(name)

    def check(self, name: str) -> None:
        """Without looking where it lies.

        Raises:
            UnknownAdapter: no name, or there is none of this name.
        """
        self._place(name)

    def _place(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise UnknownAdapter(f"adapter={_shown(name)}: is no name of an adapter.")
        found = self._now(FRESH)
        if name not in found:
            found = self._now(LEAST)  # it may have come since
            if name not in found and self._awaited():
                found = self._now(FRESH)
        if name not in found:
            near = did_you_mean(name, found)
            raise UnknownAdapter(f"adapter={name}: there is none of this name.{near}")
        return found[name]

    def default(self) -> str | None:
        """The adapter that is meant where none is named: the only one there is, else the base."""
        names = self.names()
        return names[0] if len(names) == 1 else None

    def _now(self, fresh: float) -> dict[str, Path]:
        with self._lock:
            begun = time.monotonic()
            if begun - self._at >= max(fresh, 2 * self._took):  # a slow folder is not listed all the time
                self._found, self._at = {**self._listed(), **self.fixed}, begun
                self._took = time.monotonic() - begun
            return self._found

    def _listed(self) -> dict[str, Path]:
        if self.root is None:
            return {}
        try:
            entries = [e for e in os.scandir(self.root) if NAME.fullmatch(e.name)]
        except OSError:  # a shared folder that is away for a while: what was read before stays
            return {name: path for name, path in self._found.items() if name not in self.fixed}
        found = {}
        for entry in entries:  # of thousands; whoever asks meanwhile waits
            for place in (entry.path, os.path.join(entry.path, IN_RUN)):
                if os.path.isfile(os.path.join(place, FILES[0])):
                    found[entry.name] = Path(place)
        return self._without_base(found, self.root)

    def _awaited(self) -> bool:
        """Wait for a listing that goes on; whether there was one."""
        return False

    def _without_base(self, found: dict[str, Path], root: Path | str) -> dict[str, Path]:
        if found.pop(BASE, None) and not self._warned:
            self._warned = True
            logger.warning("%s", taken(root))
        return found


def taken(folder: Path | str) -> str:
    """What is said of a sub-folder whose name is the base's."""
    told = f"adapters={folder}: {BASE} is the name of the base itself, not of an adapter"
    return f"{told}: rename {folder}/{BASE}."


def _shown(name: str) -> str:
    """What was asked for, short and printable, for a message of one line."""
    return ascii(name if len(name) <= SHOWN else f"{name[:SHOWN]}...")
