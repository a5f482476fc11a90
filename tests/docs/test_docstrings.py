"""Examples in docstrings, run one after the other."""

from __future__ import annotations

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path

import pytest
from pages import ROOT
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

EXAMPLE = (">>> ", "```")
SOURCES = [
    path
    for path in sorted((ROOT / "lora_lightning").rglob("*.py"))
    if any(sign in path.read_text(encoding="utf-8") for sign in EXAMPLE)
]
PARSERS = (DocTestParser(ELLIPSIS | NORMALIZE_WHITESPACE), PythonCodeBlockParser())


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_of_a_module(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in PythonDocStringDocument.parse(str(source), *PARSERS).examples():
        example.evaluate()


def test_an_example_that_is_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "examples_of_one.py"
    source.write_text('"""Adds.\n\n>>> 1 + 1\n3\n"""\n', encoding="utf-8")
    (example,) = PythonDocStringDocument.parse(str(source), *PARSERS).examples()
    with pytest.raises(AssertionError, match="Expected"):
        example.evaluate()
