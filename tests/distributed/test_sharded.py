"""Sharded models train what whole ones do, and leave the same small files."""

from pathlib import Path

import pytest
import torch
from processes import run

KINDS = ("model_parallel", "fsdp")


@pytest.mark.parametrize(
    "kind",
    [
        "fsdp2",
        pytest.param("fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp_blocks", marks=pytest.mark.slow),
    ],
)
def test_two_shards_train_what_the_whole_model_does(kind, tmp_path):
    """Values, frozen weights, the adapter's file and what is refused: see run_sharded.py."""
    run("run_sharded.py", kind, tmp_path)


def compare(kind: str, accelerator: str, folder: Path) -> None:
    losses = {}
    for name in ("single", kind):
        (folder / name).mkdir()
        run("run_strategy.py", name, accelerator, folder / name)
        losses[name] = [float(f.read_text()) for f in sorted((folder / name).glob("loss*.txt"))]
    resumed = [] if (kind, accelerator) == ("fsdp", "cpu") else ["resumed"]
    for name in ("full", "weights", *resumed):
        single, sharded = (
            torch.load(folder / k / f"{name}.ckpt", weights_only=True)["state_dict"] for k in ("single", kind)
        )
        assert sharded.keys() == single.keys() and any("lora_B" in n and t.any() for n, t in single.items())
        for n, tensor in single.items():
            torch.testing.assert_close(
                sharded[n].cpu(), tensor.cpu(), rtol=1e-4, atol=1e-5, msg=f"{name} {n}"
            )
    assert sum(losses[kind]) / len(losses[kind]) == pytest.approx(losses["single"][0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_strategies_on_the_cpu(kind, tmp_path):
    compare(kind, "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_strategies_on_one_gpu(kind, tmp_path):
    compare(kind, "gpu", tmp_path)
