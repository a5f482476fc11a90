"""Two processes train what one does."""

import subprocess
import sys
from pathlib import Path

import torch


def train(processes: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    folder.mkdir()
    script = Path(__file__).parent / "ddp_run.py"
    subprocess.run(
        [sys.executable, script, str(processes), str(folder)], check=True, capture_output=True, timeout=300
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
