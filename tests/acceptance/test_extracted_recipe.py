"""A digits ViT that was trained in full, made an adapter by the command: it keeps its accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lightning.app.application import main as train
from lora_lightning.app.cli import main as command

QUICK = ["trainer.max_epochs=4", "trainer.enable_progress_bar=false", "logger=none", "compare=[]"]


def accuracy(what: Path, out: Path) -> float:
    command(["evaluate", f"adapter={what}", f"out={out}"])
    return float(json.loads(out.read_text())["scores"]["acc"])


@pytest.mark.slow
def test_an_extracted_adapter_keeps_the_accuracy_of_full_fine_tuning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(["recipe=vit_digits", "method=full", f"run_dir={run}", *QUICK])
    command(["extract", f"tuned={run}", "energy=0.9", f"out={tmp_path / 'adapter'}"])
    before = accuracy(run / "model.safetensors", tmp_path / "full.json")
    after = accuracy(tmp_path / "adapter", tmp_path / "extracted.json")
    assert before > 0.5 and after > before - 0.03


@pytest.mark.slow
def test_a_method_that_was_compared_is_extracted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(["recipe=vit_digits", f"run_dir={run}", *QUICK[:-1], "compare=[full]", "debug=fast"])
    command(["extract", f"tuned={run / 'full'}", "energy=0.9", f"out={tmp_path / 'adapter'}"])
    assert 0 <= accuracy(tmp_path / "adapter", tmp_path / "extracted.json") <= 1
