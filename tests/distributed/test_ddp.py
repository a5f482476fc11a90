"""Two processes train what one does."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def train(processes: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = Path(__file__).parent / "ddp_run.py"
    # Lightning's DDP seeds again with what an earlier seed_everything has left in the environment.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    subprocess.run(
        [sys.executable, script, str(processes), str(folder)],
        check=True,
        capture_output=True,
        timeout=300,
        env=environment,
    )
    return [torch.load(folder / f"rank{i}.pt") for i in range(processes)]


def test_two_processes_end_as_one_with_the_same_global_batch(tmp_path):
    (single,) = train(1, tmp_path / "one")
    first, second = train(2, tmp_path / "two")
    assert any("lora_B" in n and t.any() for n, t in single.items())
    assert all(torch.equal(first[n], second[n]) for n in single)
    for name, tensor in single.items():  # the mean over two halves rounds otherwise than over the whole
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6)
    checkpoint = torch.load(tmp_path / "two" / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(single)


def test_an_unused_layer_stops_every_process_and_is_named(tmp_path):
    script = Path(__file__).parent / "ddp_unused.py"
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for rank in range(2):
        strict, ddp = (tmp_path / f"rank{rank}.txt").read_text().split("\n---\n")
        assert (
            "UserError: 1 of 4 adapted layers got no gradient in the first 5 training steps: spare." in strict
        )
        assert "not used in producing the loss" in ddp  # DDP's own error, which names nothing
    assert "1 of 4 adapted layers got no gradient in the first 1 training steps: spare." in run.stderr
