"""SIGTERM in the middle of a run: a checkpoint, an exit code, and a second run that ends as if nothing had
happened."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from processes import HERE, end, finish, free_port, start
from small import Classifier, loader, trainer

import lora_lightning as ll
from lora_lightning.app.console import short_path
from lora_lightning.app.launch import PREEMPTED
from lora_lightning.app.preemption import Preempted, Preemption

SCRIPT = HERE / "run_slowly.py"


def slow(processes: int, seconds: float, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    return start([SCRIPT, processes, 1, seconds, folder], MASTER_PORT=free_port())


def complete(processes: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    code, _, errors = finish(slow(processes, 0, folder))
    assert code == 0, errors
    return [torch.load(folder / f"rank{i}.pt") for i in range(processes)]


def until(process, line: str) -> None:
    assert any(line in text for text in process.stdout), process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "everyone"), [(1, False), (2, False), (2, True)])
def test_a_preempted_run_ends_as_one_that_never_stopped(processes, everyone, tmp_path):
    (wanted, *_) = complete(processes, tmp_path / "straight")
    folder = tmp_path / "preempted" / "checkpoints"
    process = slow(processes, 0.2, folder)
    try:
        until(process, "step 6")  # in the second epoch
        (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == PREEMPTED, errors
    assert f"Ended by SIGTERM. Go on with resume={short_path(folder.parent)}" in errors
    assert 6 <= torch.load(folder / "last.ckpt", weights_only=True)["global_step"] < 24
    for found in complete(processes, folder):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_a_signal_in_the_last_validation_is_not_lost(tmp_path):
    class Sends(Callback):
        def on_validation_end(self, run, module):
            if run.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    run = trainer(tmp_path, ll.LoRACallback(rank=2), Preemption(tmp_path), Sends(), num_sanity_val_steps=0)
    with pytest.raises(Preempted):
        run.fit(Classifier(), loader(), loader())
    assert run.current_epoch == 2
    assert signal.getsignal(signal.SIGTERM) is before
