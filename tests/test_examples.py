"""The examples run at reduced size: one table each, in which LoRA is better than no adaptation."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("name", "score"), [("text_classifier", "accuracy"), ("recommender", "variance")])
def test_an_example(name, score, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    table = importlib.import_module(name).main(quick=True)
    assert capsys.readouterr().out.rstrip().endswith(table)
    header, _, *rows = table.splitlines()
    assert re.match(rf"method +rate +{score}.*, % +trained +share$", header)
    pattern = r"(before|LoRA|full fine-tuning) +\S+ +(-?[\d.]+) ± [\d.]+ +([\d,]+) +([\d.]+) %"
    cells = [re.fullmatch(pattern, row).groups() for row in rows]
    assert [method for method, *_ in cells] == ["before", "LoRA", "full fine-tuning"]
    before, lora, _ = (float(value) for _, value, *_ in cells)
    assert lora > before + 5
    assert [float(share) for *_, share in cells] == sorted(float(share) for *_, share in cells)
    assert 0 < float(cells[1][3]) < 25 and cells[2][3] == "100"
