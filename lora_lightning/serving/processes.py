"""The processes of a server as one family: Ctrl-C is the first one's, and none outlives it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker

LOOK = 0.5  # seconds between two looks at the first process


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Processes that are begun within this context never see Ctrl-C, which a terminal sends to them all."""
    resource_tracker.ensure_running()  # which would let it through again, the first time
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(first: int, other: int) -> None:
    """End this process when the first one is gone, whatever killed it.

    Args:
        first: the parent of this process.
        other: a process that is ended with it, since it cannot look by itself.
    """
    threading.Thread(target=_look, args=(first, other), name="first", daemon=True).start()


def _look(first: int, other: int) -> None:
    while os.getppid() == first:
        time.sleep(LOOK)
    with contextlib.suppress(OSError):
        os.kill(other, signal.SIGKILL)
    os._exit(1)


def end_children() -> None:
    """End whatever this process has begun and left running."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(5)
        if child.is_alive():
            child.kill()
