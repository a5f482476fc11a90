"""Inputs that are made again in the backward: the same bits, fewer bytes, and when not to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import saved_bytes
from lora_lightning.kernels import common as kernels
from lora_lightning.kernels import sources
from lora_lightning.kernels.functional import lora_linear
from lora_lightning.kernels.sources import source_of

WIDTH = 48
MAKERS = {
    "layer_norm": nn.LayerNorm(WIDTH, eps=1e-3),
    "layer_norm-no_bias": nn.LayerNorm(WIDTH, bias=False),
    "layer_norm-plain": nn.LayerNorm(WIDTH, elementwise_affine=False),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "gelu-dropout0": nn.Sequential(nn.GELU(), nn.Dropout(0.0)),
}
for maker in MAKERS.values():
    for parameter in maker.parameters():
        nn.init.normal_(parameter)


def layer(x, recompute=True, **options):
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=generator).to(x.dtype) for s in ((32, WIDTH), (4, WIDTH), (32, 4)))
    A, B = (t.float().requires_grad_() if x.dtype == torch.bfloat16 else t.requires_grad_() for t in (A, B))
    options = {"implementation": "auto" if recompute else "keep_inputs"} | options
    return lora_linear(x, W, None, A, B, **options), (A, B)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{"merged": True}, {"merged": False}, {"dropout": 0.3}], ids=str)
def test_gradients_are_the_same_to_the_last_bit(name, dtype, options, monkeypatch):
    monkeypatch.setattr(kernels, "CACHED", 1)  # pieces of 64 rows
    source = torch.randn(3, 70, WIDTH).to(dtype).requires_grad_()
    maker, found = copy.deepcopy(MAKERS[name]).to(dtype), []
    for recompute in (True, False):
        torch.manual_seed(1)
        x = maker(source * 1)
        y, factors = layer(x, recompute, **options)
        found.append(torch.autograd.grad(y.square().sum(), (*factors, source)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_second_derivatives_know_that_a_norm_depends_on_its_input(name):
    source = torch.randn(2, 3, WIDTH).double().requires_grad_()
    maker, found = copy.deepcopy(MAKERS[name]).double(), []
    for implementation in ("auto", "fused", "reference"):
        y, factors = layer(maker(source * 1), implementation=implementation)
        trained = [*factors, source]
        first = torch.autograd.grad(y.square().sum(), trained, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], found[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_the_input_is_not_saved(name):
    source = torch.randn(3, 70, WIDTH, requires_grad=True)
    module, size = MAKERS[name], 4 * source.numel()

    def bytes_of(recompute):
        def forward():
            return layer(module(source * 1), recompute)[0]

        return saved_bytes(module, forward)

    assert bytes_of(False) - bytes_of(True) == size


def test_a_small_input_is_kept(monkeypatch):
    """Making it again takes longer than it saves."""
    source = torch.randn(3, 70, WIDTH, requires_grad=True)
    sizes = []
    for least in (source.nbytes, source.nbytes + 1):
        monkeypatch.setattr(sources, "LEAST", least)
        sizes.append(saved_bytes(MAKERS["gelu"], lambda: layer(MAKERS["gelu"](source * 1))[0]))
    assert sizes[1] - sizes[0] == source.nbytes


def made(name="layer_norm"):
    return MAKERS[name](torch.randn(3, 70, WIDTH, requires_grad=True) * 1)


def test_where_the_input_itself_is_kept():
    x = made()
    assert source_of(x) is not None
    assert source_of(x.transpose(0, 1)) is None
    assert source_of(x.detach()) is None
    with torch.no_grad():
        x.mul_(2)  # no longer what the layer norm made
    assert source_of(x) is None
    freed = made()
    freed.sum().backward()
    assert source_of(freed) is None
    before = torch.randn(3, 70, WIDTH, requires_grad=True) * 1
    after = F.gelu(before)
    before.add_(1)
    assert source_of(after) is None
    with torch.autograd.graph.save_on_cpu():
        assert source_of(made()) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    source = torch.randn(3, 70, WIDTH, requires_grad=True)
    factors = layer(source)[1]
    calls = []

    def block(x):
        calls.append(1)
        return lora_linear(MAKERS["layer_norm"](x * 1), torch.ones(32, WIDTH), None, *factors)

    wanted = torch.autograd.grad(block(source).square().sum(), source)[0]
    calls.clear()
    checkpoint(block, source, use_reentrant=reentrant).square().sum().backward()
    assert len(calls) == 2
    assert torch.equal(source.grad, wanted)


def test_a_source_that_changes_before_the_backward_is_an_error():
    source = torch.randn(3, 70, WIDTH, requires_grad=True) * 1
    y, factors = layer(F.gelu(source))
    with torch.no_grad():
        source.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), factors)
