"""Where progress is shown: a terminal, a notebook, or lines in a file. What is shown, `progress` says."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from lora_lightning.utils.ranks import on_rank_zero

LABEL = 18  # columns of what is done, where there is room: bars below each other line up
LEAST, MOST = 10, 28  # columns of the bar itself
ROOMY = 99  # columns of a terminal that has room for all of that
OFTEN = 0.2  # seconds between two frames of a terminal
IN_NOTEBOOK = 0.5  # and of a notebook, which keeps what it is sent
CHEAP = 150  # times what a frame took pass before the next
FIRST_LINE, RAREST = 10.0, 600.0  # seconds before the first line in a file, and between two at most
ERASE = "\r\x1b[2K"


class Frame(NamedTuple):
    """What is to be seen at one time.

    Attributes:
        what: is done.
        share: from 0 to 1, None where it is not known.
        parts: what is told of it, the most important first.
    """

    what: str
    share: float | None
    parts: list[str]

    def line(self) -> str:
        """As a line of a file."""
        return "  ".join([f"{self.what:<{LABEL}}", *self.parts]).rstrip()


class Screen:
    """Shows nothing: of processes that are not the first of a distributed run. Others show one piece of work.

    Attributes:
        redraws: whether a frame takes the place of the last.
    """

    redraws = False

    def inner(self) -> Screen:
        """For work inside this."""
        return self

    def open(self) -> None:
        """Before the first frame."""

    def first_wait(self, delay: float, stays: bool) -> float:
        """Seconds until work is shown for the first time, which asks for a delay."""
        return float("inf")

    def next_wait(self, cost: float) -> float:
        """Seconds until the next frame, after one that took `cost` seconds."""
        return float("inf")

    def draw(self, frame: Frame) -> None:
        """Show a frame in the place of the last."""

    def end(self, frame: Frame, stays: bool) -> None:
        """Show the last frame of some work, or take it away."""

    def close(self) -> None:
        """When the work has ended."""


class Lines(Screen):
    """A file, a pipe, a terminal that cannot redraw a line: lines, ever rarer, and none of short work."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.wait = FIRST_LINE
        self.told = ""  # last

    def inner(self) -> Screen:
        return Lines(self.stream)

    def first_wait(self, delay: float, stays: bool) -> float:
        self.wait = RAREST if stays else FIRST_LINE
        return self.wait

    def next_wait(self, cost: float) -> float:
        self.wait = min(2 * self.wait, RAREST)
        return self.wait

    def draw(self, frame: Frame) -> None:
        if frame.line() == self.told:
            return
        self.told = frame.line()
        with contextlib.suppress(OSError, ValueError):  # closed, full: no reason to end the work
            sys.stdout.flush()  # or what was printed before would come after
            print(self.told, file=self.stream, flush=True)

    def end(self, frame: Frame, stays: bool) -> None:
        if self.told and not stays:
            self.draw(frame)


class Notebook(Screen):
    """One output of a cell, updated in place."""

    redraws = True

    def __init__(self) -> None:
        self.handle: Any = None

    def inner(self) -> Screen:
        return Notebook()

    def first_wait(self, delay: float, stays: bool) -> float:
        return delay

    def next_wait(self, cost: float) -> float:
        return max(IN_NOTEBOOK, CHEAP * cost)

    def draw(self, frame: Frame) -> None:
        from IPython.display import display

        shown = {"text/plain": frame.line(), "text/html": _as_html(frame)}
        if self.handle is None:
            self.handle = display(shown, raw=True, display_id=True, metadata={"progress": True})
        else:
            self.handle.update(shown, raw=True, metadata={"progress": True})

    def end(self, frame: Frame, stays: bool) -> None:
        if stays or self.handle is not None:
            self.draw(frame)


class Terminal(Screen):
    """One line that is redrawn, below all that is printed meanwhile; of work inside other work the inner one.
    The cursor stays as it is, so that nothing has to be put right after a process that was killed."""

    redraws = True

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.stream = stream
        self.draft = _Draft(str(getattr(stream, "encoding", None) or "utf-8"))
        self.console = Console(file=self.draft, force_terminal=True, highlight=False, emoji=False)
        self.line = ""  # that is on the screen
        self.bar = MOST  # columns, which only become fewer: a bar that breathes cannot be read
        self.above: list[_Above] = []
        self.unfinished = False  # a printed line that was begun and not ended: the bar waits
        self.opened = 0

    def open(self) -> None:
        self.opened += 1
        if self.opened == 1:
            names = [name for name in ("stdout", "stderr") if _is_terminal(getattr(sys, name))]
            self.above = [_Above(name, self) for name in names]

    def close(self) -> None:
        self.opened -= 1
        if not self.opened:
            for stream in self.above:
                stream.give_back()
            self.above = []

    def first_wait(self, delay: float, stays: bool) -> float:
        return delay

    def next_wait(self, cost: float) -> float:
        return max(OFTEN, CHEAP * cost)

    def draw(self, frame: Frame) -> None:
        self.line = self._rendered(frame)
        if not self.unfinished:
            self._write(ERASE + self.line)

    def end(self, frame: Frame, stays: bool) -> None:
        if stays:
            self._write("\n" if self.unfinished else ERASE)
            self._write(self._rendered(frame) + "\n")
            self.unfinished = False
        elif self.line and not self.unfinished:
            self._write(ERASE)
        self.line, self.bar = "", MOST

    def before_print(self) -> None:
        """Make room, where the bar stands."""
        if self.line and not self.unfinished:
            self._write(ERASE)

    def after_print(self, text: str) -> None:
        """Put the bar below, once a line is whole."""
        self.unfinished = not text.endswith("\n")
        if self.line and not self.unfinished:
            self._write(self.line)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal has gone: no reason to end the work
            self.stream.write(text)
            self.stream.flush()

    def _rendered(self, frame: Frame) -> str:
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        width = self.console.width - 1  # a full line would wrap on some terminals
        what = Text(f"{frame.what:<{LABEL}} " if width >= ROOMY else f"{frame.what} ", "bold")
        what.truncate(width)
        told = [Text(f"  {part}") for part in frame.parts]
        while told and _room(width, what, told) < LEAST:
            told.pop()
        shown: list[Any] = [what, *told]
        self.bar = min(self.bar, max(LEAST, _room(width, what, told)))
        if _room(width, what, told) >= LEAST:
            share = None if frame.share is None else 100 * frame.share
            total = None if share is None else 100.0
            shown.insert(1, ProgressBar(total, share or 0.0, width=self.bar))
        for one in shown:
            self.console.print(one, end="", soft_wrap=True)
        return self.draft.taken()


class _Draft(io.StringIO):
    """Where a frame is drawn before it is sent in one piece, of the terminal's encoding."""

    encoding = ""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self.encoding = encoding

    def taken(self) -> str:
        """What was drawn, which is forgotten."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


class _Above:
    """A standard stream whose text goes above the bar, in its place meanwhile; also in that of logging."""

    def __init__(self, name: str, terminal: Terminal) -> None:
        self.name, self.terminal = name, terminal
        self.stream = getattr(sys, name)
        self.owner = os.getpid()
        setattr(sys, name, self)
        self.handlers = [h for h in _handlers() if h.stream is self.stream]
        for handler in self.handlers:
            handler.setStream(self)

    def give_back(self) -> None:
        if getattr(sys, self.name) is self:
            setattr(sys, self.name, self.stream)
        for handler in self.handlers:
            if handler.stream is self:
                handler.setStream(self.stream)

    def write(self, text: str) -> int:
        if not text or os.getpid() != self.owner or self not in self.terminal.above:  # a loader's worker
            return int(self.stream.write(text))
        self.terminal.before_print()
        count = int(self.stream.write(text))
        self.stream.flush()
        self.terminal.after_print(text)
        return count

    def flush(self) -> None:
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def screen_of() -> Screen:
    """Where this process shows progress now.

    Lines are for files and pipes, `TERM=dumb`, CI (`CI=true`), and commands that a notebook runs, whose
    output it would keep frame by frame; also where rich, which draws the bar, is not installed.
    """
    if not on_rank_zero():
        return Screen()
    if _in_kernel():
        return Notebook()
    if sys.stderr is None:
        return Screen()
    redraws = _is_terminal(sys.stderr) and os.environ.get("TERM") not in ("dumb", "unknown")
    apart = os.environ.get("CI", "").lower() in ("", "0", "false") and "JPY_PARENT_PID" not in os.environ
    if redraws and apart and importlib.util.find_spec("rich"):
        return Terminal(sys.stderr)
    return Lines(sys.stderr)


def _in_kernel() -> bool:
    """Whether this is a notebook's own process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, or closed
        return False


def _handlers() -> Iterator[Any]:
    """All handlers of logging that write to a stream."""
    for logger in (logging.root, *list(logging.Logger.manager.loggerDict.values())):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler


def _room(width: int, what: Any, told: list[Any]) -> int:
    """Columns that are left for the bar."""
    return width - sum(int(text.cell_len) for text in (what, *told))


def _as_html(frame: Frame) -> str:
    value = "" if frame.share is None else f' value="{frame.share:.4f}"'
    told = html.escape("  ".join(frame.parts))
    return f"<div><b>{html.escape(frame.what)}</b> <progress{value}></progress> {told}</div>"
