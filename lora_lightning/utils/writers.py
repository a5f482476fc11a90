"""Several writers of one folder: they take turns, and what a killed one has begun is finished or removed.

A writer makes its files in a hidden folder within the folder, which it locks while it lives; the system takes
the lock from the dead. On systems and network drives without such locks (flock) nobody waits, and what others
have left stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

WRITING = ".lora-writing-"  # begins the name of the hidden folder while files are made in it,
MOVING = ".lora-moving-"  # and once several are complete, before the first of them takes its place
PATIENCE = 60.0  # seconds to wait for the others, who hold a folder's lock while they rename files in it


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` to make files in, gone afterwards with what is left in it. What dead
    writers have left is settled first."""
    with _turn(folder):
        _settle(folder)
        place = folder / f"{WRITING}{uuid.uuid4().hex[:12]}"
        place.mkdir()
        handle = _lock(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _unlock(handle)


def put_in_place(place: Path, names: Sequence[str]) -> None:
    """Rename the complete files of a workplace, `0.NAME`, `1.NAME`, …, to their names in its folder. Of
    several, all follow once the first has moved; where the process is killed between two of them, the next
    writer finishes, and readers find the rest by `on_the_way`.

    Raises:
        OSError: nothing has moved; or, of several, the rest waits for the next writer.
    """
    folder = place.parent
    with _turn(folder):
        if len(names) == 1:
            os.replace(place / f"0.{names[0]}", folder / names[0])
            return
        moving = folder / place.name.replace(WRITING, MOVING)
        os.rename(place, moving)
        try:
            _finish(moving)
        except BaseException:
            with contextlib.suppress(OSError):
                _finish(moving)
            raise


def on_the_way(folder: Path, name: str) -> list[Path]:
    """Complete files of this name whose fellows have taken their places already, or are about to."""
    found = []
    for place in _places(folder, MOVING):
        with contextlib.suppress(OSError):  # it has arrived
            found += [p for p in place.iterdir() if p.name.partition(".")[2] == name]
    return found


def _places(folder: Path, prefix: str) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(prefix)]


def _settle(folder: Path) -> None:
    """Finish what dead writers had begun to move, and remove what they had not. In the writer's turn."""
    for place in [*_places(folder, WRITING), *_places(folder, MOVING)]:
        with contextlib.suppress(OSError):  # its writer lives, or it is another user's
            handle = _lock(place)
            if handle is None:
                continue
            try:
                if place.name.startswith(MOVING):
                    _finish(place)
                else:
                    shutil.rmtree(place)
            finally:
                _unlock(handle)


def _finish(moving: Path) -> None:
    for path in sorted(moving.iterdir(), key=lambda p: int(p.name.partition(".")[0])):
        os.replace(path, moving.parent / path.name.partition(".")[2])
    moving.rmdir()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """While no other writer moves files in the folder."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            handle = _lock(folder)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process has locked the folder") from None
            time.sleep(0.002)
    try:
        yield
    finally:
        _unlock(handle)


def _lock(folder: Path) -> int | None:
    """A handle that locks the folder, or None where there are no locks.

    Raises:
        BlockingIOError: another holds it.
    """
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if handle is not None:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _unlock(handle: int | None) -> None:
    """Not by closing alone: a process that was forked meanwhile would go on holding the lock."""
    if handle is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
