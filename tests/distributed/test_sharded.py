"""Sharded models train what whole ones do, and leave the same small files."""

from pathlib import Path

import pytest
import torch
from processes import ROOT, finish, free_port, run, start
from safetensors.torch import load_file
from small import Classifier, vit

import lora_lightning as ll

TRAINERS = ("ddp_sim", "model_parallel")
FILE = "adapter_model.safetensors"
KINDS = ("model_parallel", "fsdp")


@pytest.mark.slow  # "fsdp2" is a part of run_together.py
@pytest.mark.parametrize(
    ("kind", "init"),
    [("fsdp", "default"), ("fsdp_blocks", "default"), ("fsdp_blocks", "pissa"), ("fsdp2", "pissa")],
)
def test_two_shards_train_what_the_whole_model_does(kind, init, tmp_path):
    """Values, frozen weights, the adapter's file and what is refused: see run_sharded.py."""
    run("run_sharded.py", kind, tmp_path, INIT=init)


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
        single = {n: t for n, t in single.items() if t.numel()}  # without the guard, which sharded ones lack
        assert sharded.keys() == single.keys() and any("lora_B" in n and t.any() for n, t in single.items())
        for n, tensor in single.items():
            torch.testing.assert_close(
                sharded[n].cpu(), tensor.cpu(), rtol=1e-4, atol=1e-5, msg=f"{name} {n}"
            )
    torch.manual_seed(0)
    alone = ll.load_from_checkpoint(Classifier, folder / kind / "weights.ckpt", model=vit())
    saved = torch.load(folder / kind / "weights.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(t, saved[n].cpu()) for n, t in alone.state_dict().items())
    assert sum(losses[kind]) / len(losses[kind]) == pytest.approx(losses["single"][0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_strategies_on_the_cpu(kind, tmp_path):
    compare(kind, "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_strategies_on_one_gpu(kind, tmp_path):
    compare(kind, "gpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", ["model_parallel", "fsdp", "deepspeed"])
def test_the_application_on_one_gpu(trainer, tmp_path):
    if trainer == "deepspeed":
        pytest.importorskip("deepspeed")
    words = [f"trainer={trainer}", "trainer.devices=1", "debug=fast", "compare=[]", "hydra.run.dir=run"]
    code, _, errors = finish(start([ROOT / "train.py", *words], cwd=tmp_path))
    assert code == 0, errors
    assert any("lora_B" in name for name in load_file(tmp_path / "run" / "adapter" / FILE))


@pytest.mark.slow
def test_the_application_shards_and_saves_as_one_process_does(tmp_path):
    tiny = ["debug=fast", "compare=[]", "trainer.precision=32-true", "trainer.accelerator=cpu"]
    for trainer in TRAINERS:
        words = [f"trainer={trainer}", f"hydra.run.dir={trainer}", *tiny]
        code, _, errors = finish(start([ROOT / "train.py", *words], cwd=tmp_path, MASTER_PORT=free_port()))
        assert code == 0, errors
    ddp, sharded = (load_file(tmp_path / t / "adapter" / FILE) for t in TRAINERS)
    assert ddp.keys() == sharded.keys() and any("lora_B" in n and t.any() for n, t in ddp.items())
    for name, tensor in ddp.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
