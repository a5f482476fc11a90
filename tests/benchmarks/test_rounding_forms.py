"""The ways of rounding W' that benchmarks.rounding compares, and the layers that compute by them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lightning as ll
from benchmarks.rounding_forms import HALF, ROUNDINGS, MergedLinear, MergedWeight, Rounder, rounded_by, units

HALVES = [r for r in ROUNDINGS if r != "exact"]
RANDOM = ("stochastic", "dither")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_unit_is_the_distance_of_neighbours():
    values = randn(64, 64).to(HALF)
    above = (values.view(torch.int16) + 1).view(HALF)
    assert torch.equal(units(values), (above.float() - values.float()).abs())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_bfloat16_has_stays_what_it_is(rounding):
    values = torch.cat([randn(4096).to(HALF), torch.tensor([0.0, -0.0, 1.0, -2.0, 3e38, 1e-38]).to(HALF)])
    assert torch.equal(Rounder(rounding)(values.float()).to(HALF).view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize(("rounding", "bound"), [("nearest", 0.5), ("stochastic", 1.0), ("dither", 1.0)])
def test_errors_in_units(rounding, bound):
    values = randn(128, 128)
    errors = (Rounder(rounding)(values).float() - values).abs() / units(values)
    assert 0.4 * bound < errors.max() <= bound


@pytest.mark.parametrize("rest", [1 / 64, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("rounding", RANDOM)
def test_the_mean_of_many_entries_is_what_was_rounded(rounding, sign, rest):
    count = 2**18
    values = torch.full((count,), sign * (1 + rest / 128))  # units of 1/128 there
    found = (Rounder(rounding)(values).double().mean() - values[0].double()).abs() * 128
    assert found < 5 * (rest * (1 - rest) / count) ** 0.5


def test_nearest_keeps_nothing_below_half_a_unit():
    W = randn(256, 256).to(HALF).float()
    D = 0.4 * units(W) * randn(256, 256, seed=1).sign()
    grows = (W * D > 0) | (W.abs().log2() % 1 > 0)  # below a power of two the units are half as large
    assert torch.equal(Rounder("nearest")(W + D).float()[grows], W[grows])
    kept = ((Rounder("dither")(W + D).float() - W) * D).sum() / D.square().sum()
    assert 0.95 < kept < 1.05


def test_noise_is_fresh_or_drawn_once_for_a_shape():
    values = randn(32, 48)
    stochastic, dither = Rounder("stochastic"), Rounder("dither")
    assert not torch.equal(stochastic(values), stochastic(values))
    assert torch.equal(dither(values), dither(values))
    assert torch.equal(dither(values), Rounder("dither")(values))
    assert not torch.equal(dither(values), Rounder("dither", seed=1)(values))


def test_a_way_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'up': give one of exact, nearest, stochastic, dither"):
        Rounder("up")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gradients_of_a_linear_layer(rounding):
    x, W, A, B = randn(2, 40, 24).to(HALF), randn(32, 24, seed=1).to(HALF), randn(4, 24), randn(32, 4)
    bias, dY = randn(32, seed=2).to(HALF), randn(2, 40, 32, seed=3).to(HALF)
    given = [t.requires_grad_() for t in (x, A, B)]
    y = MergedLinear.apply(x, W, bias, A, B, 0.5, Rounder(rounding))
    found = torch.autograd.grad(y, given, dY)
    x64, W64, A64, B64, b64 = (t.detach().double().requires_grad_() for t in (x, W, A, B, bias))
    right_y = x64 @ (W64 + 0.5 * B64 @ A64).t() + b64
    right = torch.autograd.grad(right_y, [x64, A64, B64], dY.double())
    for mine, true in zip((y, *found), (right_y, *right), strict=True):
        assert mine.dtype == (HALF if mine.shape in (y.shape, x.shape) else torch.float32)
        assert (mine - true).norm() < 0.01 * true.norm()


def test_gradients_of_a_weight_pass_the_rounding():
    W, A, B = randn(16, 6, 3), randn(4, 6, 3).requires_grad_(), randn(16, 4).requires_grad_()
    dW = randn(16, 6, 3, seed=5)
    found = torch.autograd.grad(MergedWeight.apply(W, A, B, 0.5, Rounder("nearest")), [A, B], dW.to(HALF))
    right = torch.autograd.grad(0.5 * B @ A.flatten(1), [A, B], dW.to(HALF).float().flatten(1))
    for mine, true in zip(found, right, strict=True):
        torch.testing.assert_close(mine, true)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(8, 12, 3, stride=2, padding=1), nn.Linear(12, 20)

    def forward(self, x):
        return self.fc(self.conv(x).mT)


def adapted_model():
    torch.manual_seed(0)
    model = Model()
    ll.inject(model, ll.LoRAConfig(rank=4, target_modules="all", modules_to_save=None))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rounding", HALVES)
def test_adapted_layers_compute_by_the_rounded_weight(rounding, autocast):
    model, x = adapted_model(), randn(2, 8, 10)
    if not autocast:
        model, x = model.bfloat16(), x.to(HALF)
    with rounded_by(Rounder(rounding)), torch.autocast("cpu", HALF, enabled=autocast):
        y = model(x)
    rounder = Rounder(rounding)
    with torch.no_grad():
        bases = [layer.base_weight("weight").float() for layer in (model.conv, model.fc)]
        updates = [layer.updates("default")[0] for layer in (model.conv, model.fc)]
        merged = [rounder(W + update.product(W)) for W, update in zip(bases, updates, strict=True)]
        h = F.conv1d(x.to(HALF), merged[0], model.conv.bias.to(HALF), 2, 1)
        right = F.linear(h.mT, merged[1], model.fc.bias.to(HALF))

    assert torch.equal(y, right)
