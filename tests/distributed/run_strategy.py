"""Trains a small adapted ViT by a Lightning Trainer, saves checkpoints, and goes on from one in a fresh
Trainer: run by test_sharded.py.

Lightning refuses FSDP on the CPU, torch does not: a subclass passes. Where torch gathers without copying to
another device, both averages of an optimizer's state come out as the last: there the weights alone go on.

Arguments: single, model_parallel or fsdp; accelerator; folder.
"""

import sys
from pathlib import Path

import lightning.pytorch.strategies.fsdp as lightning_fsdp
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from small import Classifier, loader, trainer, vit
from timm.models.vision_transformer import Block
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard

import lora_lightning as ll


class FSDPOnCPU(FSDPStrategy):
    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    def barrier(self, name=None):
        torch.distributed.barrier()


def gather_in_place(module, world_size, rank0_only=True):
    config = FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only)
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, config)


class Sharding(Classifier):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


def build(kind: str, accelerator: str, devices: int):
    torch.manual_seed(0)
    if kind == "model_parallel":
        strategy = ModelParallelStrategy(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        return Sharding(vit(), lr=0.01), strategy
    if kind == "fsdp":
        cls = FSDPOnCPU if accelerator == "cpu" else FSDPStrategy
        return Classifier(vit(), lr=0.01), cls(auto_wrap_policy={Block})
    return Classifier(vit(), lr=0.01), "auto"


if __name__ == "__main__":
    kind, accelerator, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    if accelerator == "cpu":
        lightning_fsdp._get_full_state_dict_context = gather_in_place
    devices = 2 if kind != "single" and accelerator == "cpu" else 1
    options = {"accelerator": accelerator, "devices": devices}
    data = loader(vit, size=4, batch_size=4 // devices)  # one global batch is the whole data

    module, strategy = build(kind, accelerator, devices)
    first = trainer(folder, ll.LoRACallback(rank=2), max_epochs=4, strategy=strategy, **options)
    first.fit(module, data)
    first.save_checkpoint(folder / "full.ckpt")
    first.save_checkpoint(folder / "weights.ckpt", weights_only=True)

    if kind == "fsdp" and accelerator == "cpu":
        module, strategy = build(kind, accelerator, devices)
        again = trainer(folder, ll.LoRACallback(rank=2), strategy=strategy, **options)
        again.validate(module, data, ckpt_path=folder / "weights.ckpt", weights_only=True, verbose=False)
        losses = [again.callback_metrics["val/loss"].item()]
    else:
        module, strategy = build(kind, accelerator, devices)
        again = trainer(folder, ll.LoRACallback(rank=2), max_epochs=6, strategy=strategy, **options)
        again.fit(module, data, ckpt_path=folder / "full.ckpt", weights_only=True)
        again.save_checkpoint(folder / "resumed.ckpt")
        module, strategy = build(kind, accelerator, devices)
        again = trainer(folder, ll.LoRACallback(rank=2), strategy=strategy, **options)
        again.validate(module, data, ckpt_path=folder / "weights.ckpt", weights_only=True, verbose=False)
        losses = [again.callback_metrics["val/loss"].item()]
    (folder / f"loss{again.global_rank}.txt").write_text(str(losses[0]))
