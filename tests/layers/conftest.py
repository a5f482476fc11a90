"""What tests of several layer families share."""

import pytest
import torch


@pytest.fixture
def drops_alike(monkeypatch):
    """Every dropout drops the same entries of a tensor of one shape, whoever draws them."""

    def mask(x):
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) < 0.6

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * mask(x) / (1 - p) if training and p else x

    for module in ("kernels.conv", "functional"):
        monkeypatch.setattr(f"lora_lightning.{module}.keep_mask", lambda x, p: mask(x))
    monkeypatch.setattr("torch.nn.functional.dropout", dropout)
    return dropout
