"""Shards a small adapted ViT over two processes by torch alone, trains it beside an unsharded copy and
checks what must be equal: run by test_sharded.py, and with fsdp2 a part of run_together.py.

Arguments: fsdp or fsdp_blocks; folder. INIT in the environment has how the updates begin.
"""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from small import vit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import lora_lightning as ll
from lora_lightning.errors import UserError
from lora_lightning.trainer.state_dict import keep_trained_only, keep_trained_only_of

PROCESSES, BATCH = 2, 4


def shard(model: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    policy = ModuleWrapPolicy({type(model.blocks[0])}) if kind == "fsdp_blocks" else None
    return FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(4):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole_state(sharded: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    if kind == "fsdp2":
        return {n: t.full_tensor() for n, t in sharded.state_dict().items()}
    gather = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)  # offloading from the CPU crashes
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, gather):
        return sharded.state_dict()


def check(rank: int, kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = vit()
    ll.inject(model, ll.LoRAConfig(rank=2, init=os.environ.get("INIT", "default")))
    with torch.no_grad():  # an update that does something from the start, as in a resumed run
        for parameter in ll.lora_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    keep_trained_only(model)
    whole = copy.deepcopy(model)
    base = {n: p.clone() for n, p in whole.named_parameters() if ".lora." not in n and not p.requires_grad}
    sharded = shard(model, kind)
    if kind != "fsdp2":
        keep_trained_only_of(sharded, model)
    x, y = torch.randn(BATCH, 3, 16, 16), torch.randint(0, 3, (BATCH,))
    mine = slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    train(whole, x, y)
    train(sharded, x[mine], y[mine])
    with torch.no_grad():
        torch.testing.assert_close(sharded(x), whole(x), rtol=1e-4, atol=1e-5)

    expected, found = whole.state_dict(), whole_state(sharded, kind)
    assert found.keys() == expected.keys() and not base.keys() & found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)

    late = shard(vit(), kind)
    for action in (
        lambda: ll.merge(model),
        lambda: ll.eject(model),
        lambda: ll.adapters_off(model).__enter__(),
        lambda: ll.verify(model, x),
        lambda: ll.load_adapter(model, folder),
        lambda: ll.inject(late),
    ):
        with pytest.raises(UserError, match="sharded"):
            action()
    if kind == "fsdp2":
        frozen = {n: p.full_tensor() for n, p in model.named_parameters() if n in base}
        assert all(torch.equal(frozen[n], base[n]) for n in base)
        ll.save_adapter(model, folder)
        dist.barrier()
        alone = vit()
        alone.load_state_dict({n: base.get(n, t) for n, t in alone.state_dict().items()})
        ll.load_adapter(alone, folder)
        with torch.no_grad():
            torch.testing.assert_close(alone(x), whole(x), rtol=1e-4, atol=1e-5)


def work(rank: int, kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    check(rank, kind, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    mp.spawn(work, (sys.argv[1], Path(sys.argv[2])), PROCESSES)
