"""Every block of the documentation is run, or at least checked; `python tests/docs/listing.py` lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blocks import PAGES, name_of
from listing import entries_of
from reader import Reader

QUICK = ("lora-lightning copy", "lora-lightning recipes", "lora-lightning completion")
PROGRAMS = {"CONTRIBUTING.md"}
"""Pages that start so many programs of others, or of `benchmarks/`, that the check takes ten seconds."""


def checked(page: Path) -> Any:
    """The page, whose commands are checked by `-m slow` where that takes long."""
    return pytest.param(page, marks=[pytest.mark.slow] * (name_of(page) in PROGRAMS))


def followed(page: Path) -> Any:
    """The page; one with trainings and other commands that load a model is followed by `-m slow`."""
    slow = any(
        done == "executed"
        and what.startswith(("lora-lightning", "python train.py"))
        and not what.startswith(QUICK)
        for _, what, done in entries_of(page)
    )
    return pytest.param(page, marks=[pytest.mark.slow] * slow)


@pytest.fixture
def reader(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Reader:
    """At the start of a page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return Reader(page, lambda: "".join(capsys.readouterr()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    assert all(what for _, _, what in entries_of(page))


@pytest.mark.parametrize("page", [*map(checked, PAGES)], ids=[*map(name_of, PAGES)])
def test_commands_are_spelt_as_the_programs_read_them(page: Path, reader: Reader) -> None:
    problems = reader.check()
    assert not problems, "\n".join(problems)


@pytest.mark.shipped_threshold
@pytest.mark.parametrize("page", [*map(followed, PAGES)], ids=[*map(name_of, PAGES)])
def test_a_reader_can_follow(page: Path, reader: Reader) -> None:
    reader.follow()
