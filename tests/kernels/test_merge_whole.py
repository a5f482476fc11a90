"""W' of convolutions, many at once: as of each alone, in W's memory format; and of a whole model."""

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels import together
from lora_lightning.kernels.merge_whole import FactoredKernel, merge_whole
from lora_lightning.kernels.weights import sum_of

CASES = {
    "1d": ((12, 8, 3), 1),
    "2d": ((12, 8, 3, 3), 1),
    "1x1": ((12, 8, 1, 1), 1),
    "groups": ((12, 4, 3, 3), 2),
    "depthwise": ((12, 1, 3, 3), 1),
    "3d": ((12, 8, 1, 2, 3), 1),
}


def kernels(name, n, dtype=torch.float64, wide=torch.float64, dora=False, rows=False, last=False):
    shape, groups = CASES[name]
    out = []
    for _ in range(n):
        W = torch.randn(shape, dtype=wide).to(dtype)
        if last and W.dim() == 4:
            W = W.contiguous(memory_format=torch.channels_last)
        A = torch.randn(groups * 2, *shape[1:], dtype=wide)
        B = torch.randn(shape[0], 2, dtype=wide)
        m, c = (torch.rand(shape[0], dtype=wide) - 0.2 if asked else None for asked in (dora, rows))
        out.append(FactoredKernel(W, A, B, m, c))
    return out


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_sum(name, last):
    for dora in (False, True):
        for rows in (False, True):
            given = kernels(name, 3, dora=dora, rows=rows, last=last)
            for (W, A, B, m, c), found in zip(given, merge_whole(given, 0.5, torch.float64), strict=True):
                wanted = sum_of(W, A, B, 0.5)
                scale = torch.ones(12, dtype=torch.float64) if c is None else c
                if m is not None:
                    scale = scale * m / wanted.flatten(1).norm(dim=1)
                wanted = wanted * scale.view(-1, *[1] * (W.dim() - 1))
                torch.testing.assert_close(found.weight, wanted, rtol=1e-12, atol=1e-12)
                assert found.weight.stride() == W.stride()
                assert (found.row_factors is None) == (not dora and not rows)
                if found.row_factors is not None:
                    torch.testing.assert_close(found.row_factors, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once_and_many_as_each_alone(dtype):
    for autocast in (False, True):
        given = kernels("groups", 3, dtype, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = merge_whole(given, 0.5, torch.bfloat16)
            alone = [merge_whole([one], 0.5, torch.bfloat16)[0] for one in given]
        for one, other, (W, A, B, *_) in zip(found, alone, given, strict=True):
            exact = sum_of(W, A, B, 0.5)
            assert torch.equal(one.weight, other.weight) and one.weight.dtype == torch.bfloat16
            if dtype != torch.bfloat16:  # to nearest
                assert torch.equal(one.weight, exact.bfloat16())
            assert (one.weight.float() - exact).abs().le(exact.abs() * 2**-7).all()


def test_an_update_of_zero_leaves_half_weights_as_they_are():
    (given,) = kernels("2d", 1, torch.bfloat16, torch.float32)
    given.B.zero_()
    assert torch.equal(merge_whole([given], 0.5, torch.bfloat16)[0].weight, given.weight)


def test_the_convolutions_of_a_model_are_formed_together(off_cpu, monkeypatch):
    def formed(layers, scaling, dtype):
        calls.append(len(layers))
        return merge_whole(layers, scaling, dtype)

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)], nn.Conv2d(8, 4, 1)).double()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules="all", modules_to_save=None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    calls: list[int] = []
    monkeypatch.setattr(together, "merge_whole", formed)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    model(x)
    assert calls == [1] * 5  # in this step the order is learned
    calls.clear()
    y = model(x)
    assert calls == [4, 1]
    y.sum().backward()
    with ll.adapters_off(model):
        base = model(x)
    ll.merge(model)
    torch.testing.assert_close(y, model(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y, base)
