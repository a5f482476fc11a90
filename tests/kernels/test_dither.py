"""A dither is right in the mean, exact where there is nothing to round, and the same everywhere."""

import pytest
import torch

import lora_lightning as ll
from lora_lightning.kernels.rounding import dithered_, rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dither_takes_the_mean_of_an_update_that_is_less_than_a_unit(dtype):
    W = torch.randn(400, 500).to(dtype)
    bits, least = (7, 0.0) if dtype == torch.bfloat16 else (10, 2.0**-24)
    unit = (2.0 ** (W.float().abs().log2().floor() - bits)).clamp_min(least)
    for share in (0.05, -0.2, 0.4, 0.9, -1.7):
        sums = W.float() + share * unit
        nearest, found = sums.to(dtype).float(), dithered_(sums.clone(), dtype).float()
        moved = ((found - W.float()) / unit).mean().item()
        assert abs(moved - share) < 0.01
        assert ((found - sums) / unit).abs().max() <= 2, "twice where it crosses a power of two"
        if abs(share) < 0.45:
            assert abs(((nearest - W.float()) / unit).mean()) < abs(share) / 3
    assert torch.equal(dithered_(W.float(), dtype), W), "what is held already stays"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dither_keeps_what_is_no_number(dtype):
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.38e38, 0.0])
    odd[0] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]  # a GPU's NaN
    found = dithered_(odd.expand(64, 5).clone(), dtype).float()
    assert found[:, 0].isnan().all() and (found[:, 1:3] == odd[1:3]).all() and (found[:, 4] == 0).all()


def test_the_noise_is_of_the_place_in_each_matrix():
    sums = torch.randn(3, 5, 8)
    together = dithered_(sums.clone(), torch.bfloat16, 3)
    assert torch.equal(together, torch.stack([dithered_(s.clone(), torch.bfloat16) for s in sums]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_sum_has_the_gradient_of_a_cast(dtype):
    sums = torch.randn(6, 7, requires_grad=True)
    found = rounded(sums, dtype)
    assert found.dtype == dtype and torch.equal(found, dithered_(sums.detach().clone(), dtype))
    found.float().mul(torch.arange(7)).sum().backward()
    assert torch.equal(sums.grad, torch.arange(7.0).expand(6, 7).to(dtype).float())
    assert rounded(sums, torch.float32) is sums


def test_a_small_update_is_in_what_reading_and_merging_give():
    """An update of a fifth of a unit in the last place: to nearest, nearly nothing of it would be left."""
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 2)).bfloat16()
    base = layer[0].weight.detach().clone()
    ll.inject(layer, ll.LoRAConfig(rank=1, target_modules=["0"]))
    update = layer[0].lora["default"].weight
    with torch.no_grad():
        update.lora_A.fill_(1)
        update.lora_B.fill_(0.2 * 2.0**-12 / update.scaling)  # most weights are between 2^-5 and 2^-4
    for weight in (layer[0].weight, ll.merge(layer) or layer[0].weight):
        moved = (weight.float() - base.float()).mean() / (0.2 * 2.0**-12)
        assert abs(moved - 1) < 0.05
