"""How far work has come: on terminals, in files, in notebooks."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
import time
import timeit
import types
from pathlib import Path

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from lora_lightning.utils import progress, screens
from lora_lightning.utils.progress import Bar, clock, speed, working
from tests.terminal import Terminal, seen

PLAIN = ("CI", "NO_COLOR", "JPY_PARENT_PID", "COLUMNS", "FORCE_COLOR", "RANK", "LOCAL_RANK", "SLURM_PROCID")
# Starts with Python's own Ctrl-C, whatever started the tests.
SCRIPT = """
import signal, sys, time, warnings
signal.signal(signal.SIGINT, signal.default_int_handler)
from lora_lightning.utils.progress import working
try:
    for number in working(range(400), "checking pictures", "pictures"):
        time.sleep(0.01)
        if number == 70:
            print("a finding")
            warnings.warn("look", stacklevel=2)
        if number == 80 and "interrupt" in sys.argv:
            signal.raise_signal(signal.SIGINT)
        if number == 100:
            break
except KeyboardInterrupt:
    print("Interrupted.", file=sys.stderr)
print(sys.stdout.isatty(), "done")
"""


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of where the tests run."""
    for name in PLAIN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def clock_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at the number in the list."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """One of 100 columns, not yet in use."""
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_file_gets_lines_ever_rarer(capsys: pytest.CaptureFixture[str], clock_of: list[float]) -> None:
    for _ in working(range(100), "checking pictures", "pictures"):
        clock_of[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "checking pictures   10/100 pictures  1:30 left  1.0/s",
        "checking pictures   30/100 pictures  1:10 left  1.0/s",
        "checking pictures   70/100 pictures  0:30 left  1.0/s",
        "checking pictures   100/100 pictures  1:40  1.0/s",
    ]


def test_of_short_work_a_file_says_nothing(capsys: pytest.CaptureFixture[str], clock_of: list[float]) -> None:
    for _ in working(range(9), "checking pictures"):
        clock_of[0] += 1
    assert capsys.readouterr().err == ""


def test_of_unknown_length_it_tells_what_is_done(
    capsys: pytest.CaptureFixture[str], clock_of: list[float]
) -> None:
    for _ in working(iter(range(11)), "reading", "rows"):
        clock_of[0] += 20
    assert capsys.readouterr().err.splitlines()[0] == "reading             1 rows  20 s each"


def test_milestones_are_lines(capsys: pytest.CaptureFixture[str], clock_of: list[float]) -> None:
    with Bar("LoRA", 40, stays=True) as bar:
        for step in range(40):
            clock_of[0] += 40
            bar.advance()
            if step in (9, 39):
                bar.milestone()
    counts = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["10/40", "25/40", "40/40"]  # a line after ten minutes without one


def test_what_was_printed_before_stands_before(tmp_path: Path) -> None:
    code = (
        "from lora_lightning.utils.progress import Bar\nprint('first')\n"
        "with Bar('LoRA', 1, stays=True) as bar: bar.milestone()\nprint('last')"
    )
    with open(tmp_path / "log", "w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT, check=True)
    first, line, last = (tmp_path / "log").read_text().splitlines()
    assert (first, last) == ("first", "last")
    assert line.startswith("LoRA  ")


@pytest.mark.parametrize("columns", [30, 60, 100])
def test_a_frame_fits_the_terminal(
    columns: int, terminal: Terminal, clock_of: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with terminal:
        for _ in working(range(100), "checking pictures", "pictures"):
            clock_of[0] += 10
    frames = seen(terminal.getvalue()).frames
    assert len(frames) == 100
    assert max(map(len, frames)) < columns
    middle = {
        30: "checking pictures ━━━━━╸━━━━━",
        60: "checking pictures ━━━━━━╺━━━━━  50/100 pictures  8:20 left",
        100: "checking pictures  ━━━━━━━━━━━━━━╺━━━━━━━━━━━━━  50/100 pictures  8:20 left  10 s each",
    }
    assert frames[49] == middle[columns]
    assert seen(terminal.getvalue()).lines == [""]  # it is cleared away


def test_a_bar_that_stays_is_a_line_in_the_end(terminal: Terminal, clock_of: list[float]) -> None:
    with terminal, Bar("LoRA", 2, "steps", delay=0, stays=True) as bar:
        for _ in range(2):
            clock_of[0] += 30
            bar.advance()
    assert seen(terminal.getvalue()).lines == [f"{'LoRA':<18} {'━' * 28}  2/2 steps  1:00  30 s each", ""]


def test_what_is_printed_stands_whole_above_the_bar(terminal: Terminal, clock_of: list[float]) -> None:
    told = logging.getLogger("tests.progress")
    handler = logging.StreamHandler(terminal)
    told.addHandler(handler)
    with terminal:
        for number in working(range(8), "reading", "rows"):
            clock_of[0] += 1
            if number == 1:
                print("printed")
            elif number == 2:
                print("begun", end="")
            elif number == 4:
                print(" and ended", file=sys.stderr)
            elif number == 5:
                told.warning("logged")
            elif number == 7:
                print("unfinished", end="")
        print()
        assert sys.stdout is sys.stderr is terminal
    told.removeHandler(handler)
    lines = seen(terminal.getvalue()).lines
    assert lines == ["printed", "begun and ended", "logged", "unfinished", ""]
    assert handler.stream is terminal


def test_only_a_terminal_has_its_prints_moved(terminal: Terminal, clock_of: list[float]) -> None:
    with terminal, contextlib.redirect_stdout(io.StringIO()) as piped:
        for _ in working(range(3), "reading"):
            clock_of[0] += 1
            assert sys.stdout is piped
            print("a row of a table")
    assert piped.getvalue() == 3 * "a row of a table\n"


def test_of_bars_inside_each_other_the_inner_one_is_shown(terminal: Terminal, clock_of: list[float]) -> None:
    with terminal:
        for _ in working(range(2), "outer"):
            for _ in working(range(2), "inner"):
                clock_of[0] += 1
    names = [frame.split()[0] for frame in seen(terminal.getvalue()).frames]
    assert names == ["inner", "inner", "outer", "inner", "inner", "outer"]
    assert progress._open == []


def test_work_that_fails_leaves_all_as_it_was(terminal: Terminal, clock_of: list[float]) -> None:
    def work() -> None:
        for number in working(range(3), "reading"):
            clock_of[0] += 1
            1 / (1 - number)

    with terminal:
        with pytest.raises(ZeroDivisionError):
            work()
        assert sys.stdout is terminal
    assert progress._open == []
    assert seen(terminal.getvalue()).lines == [""]


def test_a_workers_prints_are_its_own(terminal: Terminal, clock_of: list[float]) -> None:
    with terminal, Bar("reading", 2, delay=0):
        above = sys.stdout
        above.owner = -1  # as in another process
        print("from a worker")
    assert seen(terminal.getvalue()).lines == ["from a worker", ""]
    assert seen(terminal.getvalue()).frames == []


def test_a_terminal_that_has_gone_ends_no_work(clock_of: list[float]) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with Gone():
        for _ in working(range(3), "reading"):
            clock_of[0] += 1


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("TERM", "xterm", screens.Terminal),
        ("NO_COLOR", "1", screens.Terminal),
        ("TERM", "dumb", screens.Lines),
        ("CI", "true", screens.Lines),
        ("CI", "false", screens.Terminal),
        ("JPY_PARENT_PID", "7", screens.Lines),
    ],
)
def test_where_a_bar_is_drawn(
    name: str, value: str, kind: type, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with terminal:
        assert type(screens.screen_of()) is kind


def test_without_rich_there_are_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with terminal:
        assert type(screens.screen_of()) is screens.Lines


@pytest.mark.parametrize("colours", [True, False])
def test_colours_are_left_out_where_none_are_wanted(
    colours: bool, terminal: Terminal, clock_of: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    with terminal:
        for _ in working(range(3), "reading"):
            clock_of[0] += 1
    assert ("\x1b[38;5;" in terminal.getvalue()) is colours


def test_other_processes_of_a_run_show_nothing(
    terminal: Terminal, clock_of: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with terminal:
        for _ in working(range(100), "reading"):
            clock_of[0] += 1
    assert terminal.getvalue() == ""


def test_a_notebook_has_one_output_that_changes(
    clock_of: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], **_: object) -> None:
            shown.append(("update", data["text/plain"]))

    def display(data: dict[str, str], **_: object) -> Handle:
        shown.append(("display", data["text/plain"]))
        assert "<progress" in data["text/html"]
        return Handle()

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    inside = types.ModuleType("IPython.display")
    inside.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", inside)
    for _ in working(range(1000), "reading", "rows"):
        clock_of[0] += 0.01
    assert [kind for kind, _ in shown] == ["display", *["update"] * (len(shown) - 1)]
    assert 18 <= len(shown) <= 21  # of ten seconds, two a second
    assert shown[-1][1] == "reading             1,000/1,000 rows  0:10  100/s"


@pytest.mark.parametrize("cost", [0.0001, 0.02, 0.3])
def test_drawing_takes_less_than_a_hundredth(
    cost: float, terminal: Terminal, clock_of: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def draw(screen: screens.Terminal, frame: screens.Frame) -> None:
        nonlocal drawn
        drawn += 1
        clock_of[0] += cost

    monkeypatch.setattr(screens.Terminal, "draw", draw)
    with terminal:
        for _ in working(range(100_000), "reading"):
            clock_of[0] += 0.001
    assert drawn >= 2
    assert drawn * cost < 0.01 * clock_of[0]


@pytest.mark.slow
def test_a_fast_loop_is_hardly_slower(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three seconds of short steps, drawing takes less than a hundredth; telling a step, less than a
    hundredth of a tenth of a millisecond, by the best of several tries."""
    draw, drawing = screens.Terminal.draw, []

    def timed(screen: screens.Terminal, frame: screens.Frame) -> None:
        start = time.perf_counter()
        draw(screen, frame)
        drawing.append(time.perf_counter() - start)

    monkeypatch.setattr(screens.Terminal, "draw", timed)
    with terminal, Bar("adding", 10**9, delay=0) as bar:
        start = time.perf_counter()
        while time.perf_counter() - start < 3:
            sum(range(4000))
            bar.advance()
        whole = time.perf_counter() - start
        telling = min(timeit.repeat(bar.advance, number=1000, repeat=20)) / 1000
    assert len(drawing) > 2
    assert sum(drawing[1:]) < 0.01 * whole  # the first loads rich
    assert telling < 0.01 * 1e-4


@pytest.mark.parametrize("how", ["to the end", "interrupt"])
def test_a_real_terminal(how: str, tmp_path: Path) -> None:
    out = _in_terminal([sys.executable, "-c", SCRIPT, how], columns=60)
    assert "\x1b[?25" not in out  # the cursor is never hidden
    told = seen(out.replace("\r\n", "\n"))
    found, warned, *rest = told.lines
    assert found == "a finding" and warned.endswith("UserWarning: look")
    assert rest == [*(["Interrupted."] if how == "interrupt" else []), "True done", ""]
    assert told.frames[-1].startswith("checking pictures ━")
    assert all(len(frame) < 60 for frame in told.frames)


def _in_terminal(command: list[str], columns: int) -> str:
    """What a command sends to a terminal of its own."""
    owner, inside = pty.openpty()
    subprocess.run(["stty", "cols", str(columns)], stdin=inside, check=True)
    known = dict(os.environ)  # readline, which pytest loads, gives others COLUMNS without a word to Python
    process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, env=known)
    os.close(inside)
    sent = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while block := os.read(owner, 4096):
            sent += block
    os.close(owner)
    assert process.wait() == 0
    return sent.decode()


def test_numbers_are_short() -> None:
    assert [clock(s) for s in (0, 9.4, 754, 3723)] == ["0:00", "0:09", "12:34", "1:02:03"]
    assert [speed(r) for r in (1250.4, 12.5, 3.21, 0.8, 0.05)] == [
        "1,250/s",
        "12/s",
        "3.2/s",
        "1.25 s each",
        "20 s each",
    ]
    assert speed(12, "samples") == "12 samples/s"
