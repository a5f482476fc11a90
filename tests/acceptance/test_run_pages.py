"""The pages of short runs of each kind, in a browser: drawn, small, read on a telephone and paper."""

import json
from pathlib import Path

import pytest
from browser import chromium, opened, problems

from lora_lightning.app.application import main
from lora_lightning.app.cli import main as command

COMMON = ["debug=fast", "logger=csv", "trainer=cpu", "hydra.run.dir=run"]
RUNS = {
    "vit_digits": ["trainer.max_epochs=2", "compare=[none,linear_probe,lora]"],
    "fcos_shapes": ["compare=[none,lora]"],
    "accent_espeak": ["compare=[]", "adapters=null"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RUNS)
def test_the_page_of_a_run_reads_well_everywhere(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([f"recipe={recipe}", *COMMON, *RUNS[recipe]])
    page = Path("run/report.html")
    text = page.read_text()
    assert page.stat().st_size < 5e6
    facts = json.loads(Path("run/report/run.json").read_text())
    assert facts["command"].startswith(f"lora-lightning train recipe={recipe} debug=fast")
    assert facts["about"] in text and facts["versions"]["torch"] in text and "CPU" in facts["device"]
    for heading in (
        "Losses",
        "Learning rates",
        "What changed most",
        "Effective ranks",
        "Spectra of the updates",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert '<th scope="row">checkpoint</th>' in text, "also of one that ended before any validation"
    assert problems(page, pictures=tmp_path / "looks") == []
    if recipe == "accent_espeak":
        assert 0.2 < seconds_played(page) < 60
    page.unlink()
    command(["report", "run"])  # without data or model
    assert page.read_text() == text


def seconds_played(path):
    """Of the first sound of a page, which the browser can play."""
    with chromium() as browser, opened(browser, path) as page:
        return page.evaluate(
            """async () => {
              const sound = document.querySelector("audio");
              sound.load();
              await new Promise((done, failed) => { sound.onloadedmetadata = done; sound.onerror = failed; });
              return sound.duration;
            }"""
        )


TINY = [
    "recipe=vit_digits", "compare=[]", "trainer.max_epochs=1", "data.train_size=32",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1", "model.embed_dim=24", "model.depth=1", "model.num_heads=2",
    "model.checkpoint=null", "model.pretrained=false", "logger=csv", "trainer=cpu", "hydra.run.dir=run",
]  # fmt: skip


@pytest.mark.slow
def test_pages_of_pefts_method_and_of_one_that_went_on(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    main([*TINY, "method=peft"])
    main(["resume=run", "trainer.max_epochs=2"])
    page = Path("run/report.html")
    assert "by PEFT" in page.read_text() and json.loads(Path("run/results.json").read_text())
    assert problems(page) == []


@pytest.mark.slow
def test_the_page_of_a_tuned_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*TINY, "tune=lr"])
    assert "tune=lr" in Path("run/report.html").read_text()
    assert problems(Path("run/report.html")) == []


@pytest.mark.slow
def test_the_page_of_a_base_that_is_only_tested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*TINY, "method=none"])
    text = Path("run/report.html").read_text()
    assert "Nothing was trained" in text and ">base</th>" in text and ">after</th>" not in text
    assert problems(Path("run/report.html")) == []


@pytest.mark.slow
def test_methods_without_updates_leave_what_changed(tmp_path, monkeypatch):
    """And a run that goes on in a folder leaves nothing of the page that was there."""
    monkeypatch.chdir(tmp_path)
    words = ["compare=[]", "trainer.max_epochs=1", "data.train_size=32", "trainer.limit_val_batches=1"]
    tiny = [
        "model.embed_dim=24",
        "model.depth=1",
        "model.num_heads=2",
        "model.checkpoint=null",
        "model.pretrained=false",
    ]
    for method, changed in (("full", "model.blocks.0"), ("linear_probe", "head")):
        main([f"method={method}", *words, *tiny, "trainer.limit_test_batches=1", f"hydra.run.dir={method}"])
        found = json.loads(Path(method, "report", "updates.json").read_text())
        assert any(changed.removeprefix("model.") in layer["name"] for layer in found), found
        assert all(layer["norm"] > 0 for layer in found)
        text = Path(method, "report.html").read_text()
        assert "<h2>What changed most</h2>" in text and "Effective ranks" not in text
