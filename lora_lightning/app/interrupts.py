"""Ctrl-C: one line and exit code 130, whatever it interrupts. Loads nothing."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # exit code


class _Interrupts:
    """What this process has received and said."""

    received = False
    said = False


@atexit.register  # first of all, and so run last
def _ignore_from_now_on() -> None:
    """Python gives up its handlers before it is gone: Ctrl-C would then end it by the signal."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process itself: where there is nothing to clean up, as among imports,
    which would turn KeyboardInterrupt into errors of their own or lose it."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored: started in the background of a script
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Meanwhile the first Ctrl-C raises KeyboardInterrupt, for all to clean up; a second waits no more.

    Raises:
        KeyboardInterrupt: after Ctrl-C, also where a library has made another error of it.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    _Interrupts.received = _Interrupts.said = False
    if not main_thread or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a loader's worker, which its owner ends
            return
        _Interrupts.received = True
        leave_at_once()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if _Interrupts.received and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def wait_no_more() -> None:
    """After a first Ctrl-C, from which on Lightning ignores all others, let the next one end the process."""
    if _Interrupts.received:
        signal.signal(signal.SIGINT, _leave)


def said() -> None:
    """The user has been told; whatever Ctrl-C comes now adds nothing."""
    _Interrupts.said = True


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(Exception):  # it may have interrupted a write to the same stream
        sys.stdout.flush()
    if not _Interrupts.said and os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"\nInterrupted.\n")
    os._exit(INTERRUPTED)
