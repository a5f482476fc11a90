"""The script for a GPU, as far as it can be tested without one: its commands, and what they do on a CPU."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import models, training

SCRIPT = Path(training.__file__).with_name("gpu.sh")


def test_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = subprocess.run(["bash", SCRIPT, "--list"], capture_output=True, text=True, check=True)
    tests, *runs = (line.split() for line in listed.stdout.splitlines())
    assert tests[1:5] == ["-m", "pytest", "-m", "gpu"]
    seen = set()
    for run in runs:
        assert run[1:3] == ["-m", "benchmarks.training"]
        monkeypatch.setattr(sys, "argv", run[2:])
        options = training._options()
        assert options.device == "cuda" and options.check
        assert set(options.against.split(",")) <= set(models.WAYS)
        seen.add((options.model, options.batch, options.precision, options.compile))
    assert {model for model, *_ in seen} == {"vit_base", "resnet50", "wav2vec2_large"}
    assert {size for model, size, *_ in seen if model == "vit_base"} == {8, 128, 512}
    assert {(precision, compiles) for *_, precision, compiles in seen} == {
        (p, c) for p in ("bf16-true", "bf16-mixed") for c in (False, True)
    }


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_device_nothing_is_measured() -> None:
    done = subprocess.run(
        ["bash", SCRIPT], capture_output=True, text=True, check=False, env={"PYTHON": sys.executable}
    )
    assert done.returncode == 2 and "no CUDA device: nothing is measured" in done.stderr


def test_limits_of_a_gpu() -> None:
    options = Namespace(device="cuda", model="vit_base", dropout=0.0, dora=False)
    found = {w: {"ratio": r, "saved_mib": 1.0} for w, r in (("floor", 1.0), ("full", 1.3), ("peft", 1.6))}
    assert training._too_much(options, {**found, "ours": {"ratio": 1.15, "saved_mib": 1.0}}) == []
    assert training._too_much(options, {**found, "ours": {"ratio": 1.24, "saved_mib": 1.0}}) == [
        "time / peft is 0.775, allowed 0.75"
    ]
    problems = training._too_much(options, {**found, "ours": {"ratio": 1.4, "saved_mib": 1.0}})
    assert [line.split(" is ")[0] for line in problems] == ["time / floor", "time / peft", "time / full"]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_run_on_the_cpu(precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def tiny() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, models.CLASSES))

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(size, 16), torch.zeros(size, dtype=torch.long)

    monkeypatch.setitem(models.WORKLOADS, "tiny", models.Workload(tiny, batch, 4, "", "0", "2", peer=False))
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    for module, name in ((training, "_draw"), (training.measure, "keep_memory"), (torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(training, "_peak", lambda _: 0)  # a process of its own knows no such model
    arguments = ["training", "--model", "tiny", "--rounds", "2", "--against", "full,keep_inputs,fused"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--precision", precision])
    assert training.main() == 0
    result = json.loads((tmp_path / f"training_tiny_1t_{precision}.json").read_text())
    assert set(result["ways"]) == {"floor", "ours", "full", "keep_inputs", "fused"}
