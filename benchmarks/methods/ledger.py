"""Finished runs, a line of JSON each: appended as they end, shared by processes, whole after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEY = ("task", "method", "stage", "lr", "seed")
Key = tuple[Any, ...]
Found = dict[str, Any]


class Ledger:
    """A file of runs.

    Args:
        path: it begins where there is none.
        claims: a folder for locks, which the system opens when a process dies.
    """

    def __init__(self, path: Path, claims: Path) -> None:
        self.path, self.claims = path, claims
        claims.mkdir(parents=True, exist_ok=True)

    def runs(self) -> dict[Key, Found]:
        """Every run by its key; the later line counts. What a killed process has half written is left out."""
        if not self.path.exists():
            return {}
        lines = self.path.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return {key_of(run): run for run in found}

    def add(self, run: Found) -> None:
        """Append a run, behind whole lines."""
        line = json.dumps(run, ensure_ascii=False) + "\n"
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(line.encode())
            file.flush()

    @contextlib.contextmanager
    def claimed(self, *names: str) -> Iterator[bool]:
        """Whether this process alone has a part of the work, as long as the context lasts."""
        of = (str(self.path.resolve()), *names)  # another checkout's file is other work
        name = hashlib.sha256("/".join(of).encode()).hexdigest()[:16]
        with (self.claims / f"{self.path.stem}-{name}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def key_of(run: Found) -> Key:
    """What tells one run from another."""
    return tuple(run.get(name) for name in KEY)
