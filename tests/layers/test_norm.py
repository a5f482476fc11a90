"""Frozen norms: which layers, and that nothing moves their statistics."""

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.layers.norm import FrozenNorm, freeze_statistics, has_statistics, is_norm


def timm_norm():
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(4)


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "BatchNormAct2d": timm_norm,
}


@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_frozen_statistics_survive_train(build):
    norm = build()
    assert has_statistics(norm) and is_norm(norm)
    freeze_statistics(norm)
    freeze_statistics(norm)
    parent = nn.Sequential(norm).train()
    assert isinstance(norm, FrozenNorm) and not norm.training
    assert type(norm).__name__ == f"Frozen{build().__class__.__name__}"
    x = torch.randn(6, 4) if isinstance(norm, nn.BatchNorm1d) else torch.randn(6, 4, 3, 3)
    before = norm.running_mean.clone()
    parent(x)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)]
)
def test_norms_without_statistics_are_not_swapped(norm):
    assert is_norm(norm) and not has_statistics(norm)


@pytest.mark.parametrize(
    ("train_norm", "moves", "trains"),
    [("frozen", False, False), ("affine", False, True), ("stats", True, False), ("both", True, True)],
)
def test_train_norm(train_norm, moves, trains):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    ll.inject(model, ll.LoRAConfig(rank=2, train_norm=train_norm))
    norm = model[1]
    mean, weight = norm.running_mean.clone(), norm.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(norm.running_mean, mean) != moves
    assert torch.equal(norm.weight, weight) != trains
    with ll.adapters_off(model):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.weight, weight)
