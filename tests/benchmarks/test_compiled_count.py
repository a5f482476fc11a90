"""The counter of compiled kernels against a step that is counted by hand."""

import torch
from torch import nn

from benchmarks.compiled import counted
from benchmarks.paper_cost import Device

N, IN, OUT = 1000, 64, 96  # tokens, widths
SLOW = Device(bandwidth=1e9, half=1e12, tf32=2e10, single=1e10, instructions=1e12, launch=1e-6)


def test_a_step_of_a_linear_and_what_is_fused_behind_it() -> None:
    layer = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
    x = torch.empty(N, IN, dtype=torch.bfloat16, requires_grad=True)
    count, saved = counted(nn.Sequential(layer, nn.Tanh()), x, SLOW)
    x_, y_, w_ = N * IN, N * OUT, IN * OUT
    assert [name for name, _ in count.kernels] == ["addmm", "fused", "fused", "mm"]
    products = (x_ + w_ + OUT + y_) + (y_ + w_ + x_)
    fused = 2 * y_ + 3 * y_  # tanh; dY and y to one product of entries
    assert count.total.bytes == 2 * (products + fused)
    assert count.total.flops == 2 * 2 * N * IN * OUT
    assert saved == 2 * y_
    assert count.total.seconds == sum(max(cost.bytes / 1e9, 1e-6) for _, cost in count.kernels)
