"""Ctrl-C in a real process, at any moment from its first import on: one line and exit code 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_lightning.app.compose import CONF

# Says when the program begins, with Python's own handler, whatever started the tests.
START = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
if sys.argv[0] == "lora-lightning":
    from lora_lightning.app.entry_point import main
    print("begun", flush=True)
    main()
else:
    import lora_lightning.app.interrupts
    print("begun", flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = ["compare=[]", "trainer.enable_progress_bar=false", "trainer.max_epochs=99"]


def interrupted(words: list[str], folder: Path, after: float, times: int = 1) -> tuple[int, str]:
    """The exit code and stderr of a program that gets SIGINT this long after it has begun."""
    command = [sys.executable, "-c", START, *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(after)
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, errors


def check(words: list[str], folder: Path, after: float, times: int = 1) -> None:
    code, errors = interrupted(words, folder, after, times)
    lines = [line for line in errors.splitlines() if line.strip()]
    assert code == 130, errors
    assert len(lines) == 1 and lines[0].startswith("Interrupted."), errors


def test_among_the_imports(tmp_path: Path) -> None:
    check([str(CONF.parent / "train.py"), *TRAIN], tmp_path, 0.6)
    assert list(tmp_path.iterdir()) == []
    check(["lora-lightning", "inspect", "."], tmp_path, 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.05, 0.3, 1, 2, 4, 7, 10, 13, 16, 20, 30])
@pytest.mark.parametrize("times", [1, 3])
def test_at_any_moment_of_a_run(after: float, times: int, tmp_path: Path) -> None:
    program = str(CONF.parent / "train.py") if times == 1 else "lora-lightning"
    words = [program, *(["train"] if times == 3 else []), *TRAIN, "logger=many"]
    check(words, tmp_path, after, times)


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 8, 15, 25])
def test_in_a_sweep(after: float, tmp_path: Path) -> None:
    check([str(CONF.parent / "train.py"), "-m", *TRAIN, "lora.rank=2,4"], tmp_path, after)
