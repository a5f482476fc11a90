"""The application as processes: nothing on stderr, mistakes in one message, two of them, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.terminal import beside_progress

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def shell(
    *words: str, entry: tuple[str, ...] = (sys.executable, str(ROOT / "train.py")), **options: Any
) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*entry, *words], capture_output=True, text=True, timeout=300, env=environment, **options
    )


@pytest.mark.slow  # by default the built wheel's process promises the same
def test_a_real_process(tmp_path: Path) -> None:
    """`python train.py` in an empty folder: progress alone on stderr, nothing but the run folder left."""
    done = shell("debug=fast")
    assert done.returncode == 0, done.stderr
    assert beside_progress(done.stderr) == ""
    assert "LoRA" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["lora.rank=0", "lora.rnk=2", "recipe=foo"],
        ["-m", "lora.rank=2,0", "--fast", "seed=x"],
        ["ckpt_path=nowhere.ckpt", "optim.lr=[1", "trainer.num_nodes=2"],
    ],
)
def test_a_real_process_told_nonsense(words: list[str], tmp_path: Path) -> None:
    bad = shell(*words)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("\n3 problems in the configuration:\n  - ")
    assert len(bad.stderr.strip().splitlines()) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("command", [False, True])
def test_two_processes(sweep: bool, command: bool, tmp_path: Path) -> None:
    """DDP from both entries and under a sweep: both ranks run this job, rank 0 alone prints."""
    entry = (str(Path(sys.executable).parent / "lora-lightning"), "train")
    entry = entry if command else (sys.executable, str(ROOT / "train.py"))
    words = ["trainer=ddp_sim", "debug=fast", "compare=[]", "logger=many", "hydra.run.dir=run"]
    words += ["-m", "lora.rank=2,4", "hydra.sweep.dir=sweep"] if sweep else ["lora.rank=4"]
    done = shell(*words, entry=entry)
    assert done.returncode == 0, done.stderr
    assert beside_progress(done.stderr) == ""
    jobs = ["sweep/0", "sweep/1"] if sweep else ["run"]
    assert done.stdout.count("adapted layers") == done.stderr.count("epoch 1/1") == len(jobs)
    for job in jobs:
        assert len(list((tmp_path / job).glob("wandb/offline-run-*"))) == 1
        assert json.loads((tmp_path / job / "results.json").read_text())[0]["scores"]["acc"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [jobs[0].split("/")[0]]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["cpu", "ddp_sim"])
def test_ctrl_c(trainer: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train.py"), "compare=[]", f"trainer={trainer}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    shown = (line for line in process.stdout if line.startswith("LoRA "))
    next(shown), next(shown)  # now the first epoch's checkpoint is written
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(message.strip().splitlines()) == 1
    assert message.strip().startswith("Interrupted. Go on with resume=outputs/vit_digits/")
    folder = tmp_path / message.split("resume=")[1].strip()
    assert "state_dict" in torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert not list(tmp_path.rglob("*.tmp"))
