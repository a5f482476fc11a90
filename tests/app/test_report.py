"""`lora-lightning report`: a run's page anew, several side by side, and what it says to mistakes."""

import json
import re

import pytest
from left_runs import run

from lora_lightning.app.cli import main


def said(words, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, words)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_page_is_made_again(tmp_path, capsys):
    folder = run(tmp_path / "run")
    main(["report", str(folder)])
    assert "report.html: the page of" in capsys.readouterr().out
    assert "<h1>vit_digits: LoRA</h1>" in (folder / "report.html").read_text()
    main(["report", str(folder), f"out={tmp_path / 'elsewhere.html'}"])
    assert (tmp_path / "elsewhere.html").read_text() == (folder / "report.html").read_text()


def test_an_unfinished_run_has_a_page_that_says_so(tmp_path, capsys):
    main(["report", str(run(tmp_path / "run", ended=False))])
    assert "which has not ended" in capsys.readouterr().out
    assert "This run has not ended" in (tmp_path / "run" / "report.html").read_text()


def test_runs_side_by_side(tmp_path):
    a = run(tmp_path / "a.1", seed=1)
    b = run(tmp_path / "b<b>", accuracy=0.75, lora={"rank": 8, "dropout": 0.1})
    out = tmp_path / "both.html"
    main(["report", str(a), str(b), f"out={out}"])
    page = out.read_text()
    assert "<h1>2 runs side by side</h1>" in page and "75.0 <span>(71.0–79.0)</span>" in page
    options = re.search(r"<h2>Options that differ</h2>(.*?)</table>", page, re.DOTALL)[1]
    names = re.findall(r'<td class="name">(.*?)</td>', options)
    assert names == ["seed", "lora.rank", "lora.dropout"]
    specs = [json.loads(s) for s in re.findall(r'application/json">(.*?)</script>', page, re.DOTALL)]
    assert {"a.1", "b<b>"} in [set(s["data"]["columns"].get("of", [])) for s in specs]
    assert {"a.1", "b<b>"} in [set(s["data"]["columns"].get("run", [])) for s in specs]  # ranks
    assert "b<b>" not in page


def test_adapters_of_a_run_are_runs_of_their_own(tmp_path):
    two = run(tmp_path / "two", adapters={"x": {}, "y": {}})
    for name in ("x", "y"):
        run(two / name)
    main(["report", str(two), str(run(tmp_path / "one")), f"out={tmp_path / 'all.html'}"])
    page = (tmp_path / "all.html").read_text()
    assert "<h1>3 runs side by side</h1>" in page


def test_all_mistakes_are_told_at_once(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = said([tmp_path / "empty", run(tmp_path / "run")], capsys)
    assert "lies in none of their folders: give out=FILE.html." in message
    assert "empty: is not a run's folder: it has no config.yaml" in message
    (tmp_path / "there.html").write_text("mine")
    assert "is there already" in said([tmp_path / "run", f"out={tmp_path / 'there.html'}"], capsys)
    assert "ends in .html" in said([tmp_path / "run", "out=x.pdf"], capsys)
    again = said([tmp_path / "run", tmp_path / "run", f"out={tmp_path / 'a.html'}"], capsys)
    assert "is given twice" in again and not (tmp_path / "a.html").exists()
    assert (tmp_path / "there.html").read_text() == "mine"
    main(["report", str(tmp_path / "run"), f"out={tmp_path / 'there.html'}", "overwrite=true"])
    assert (tmp_path / "there.html").read_text() != "mine"
