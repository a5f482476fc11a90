"""What loggers are told by LoRACallback in somebody's own module, in two processes: by the first alone."""

import csv
import json

import pytest
from processes import run
from wandb_file import read_wandb


@pytest.mark.slow
def test_only_the_first_process_tells_the_loggers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    run("run_logged.py", 2, tmp_path)
    spectra = json.loads((tmp_path / "spectra.json").read_text())
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    told = read_wandb(file)
    assert told.config["LoRACallback"]["rank"] == 2
    for name, value in spectra.items():
        assert told.last()[f"lora/effective_rank/{name}"] == pytest.approx(value, rel=1e-5)
    assert len(told.curve("lora/grad_norm")) == 4, "two epochs of two steps"
    assert len(told.curve("lora/update_norm")) == 2
    assert told.last()["plan/nrows"] == told.last()["spectra/nrows"] == len(spectra)
    with open(tmp_path / "csv" / "plan.csv", encoding="utf-8", newline="") as plan:
        assert [row["layer"] for row in csv.DictReader(plan)] == list(spectra)
    with open(tmp_path / "csv" / "metrics.csv", encoding="utf-8", newline="") as metrics:
        assert len([row for row in csv.DictReader(metrics) if row["lora/grad_norm"]]) == 4
