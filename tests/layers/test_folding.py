"""Frozen norms folded into the convolutions before them: nothing but bits changes."""

import pytest
import torch
from folding_networks import EXACT, adapted, agree, network, randomized, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from lora_lightning.kernels import conv_form


@pytest.mark.parametrize("road", ["cpu", "dense", "merged"])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        ({}, {}),
        ({"bias": True}, {"train_bias": "lora_only"}),
        ({"groups": 4}, {"use_dora": True}),
        ({"padding_mode": "reflect"}, {"use_dora": True}),
        ({"groups": 2}, {"dropout": 0.5}),
        ({}, {"dropout": 0.5, "use_dora": True}),
    ],
    ids=["plain", "bias", "depthwise-dora", "dora", "dropout", "dropout-dora"],
)
def test_values_and_gradients(road, build, options, folded, request, monkeypatch, drops_alike):
    if road != "cpu":
        request.getfixturevalue("off_cpu")
        monkeypatch.setattr(conv_form, "dense_pays", lambda *given: road == "dense")
        monkeypatch.setattr(
            torch, "native_dropout", lambda x, p, t: (drops_alike(x, p), drops_alike(x * 0 + 1) > 0)
        )
    model = network(**build)
    agree(adapted(model, True, **options), adapted(model, False, **options))
    assert len(folded) == 6


def test_the_forms_of_small_layers_and_1d_and_3d(monkeypatch, folded):
    for conv, norm, size in ((nn.Conv1d, nn.BatchNorm1d, (9,)), (nn.Conv3d, nn.BatchNorm3d, (4, 4, 4))):
        model = randomized(nn.Sequential(conv(3, 6, 2), norm(6), nn.GELU(), conv(6, 4, 1), norm(4)))
        for small in (0, 2**19):
            monkeypatch.setattr(conv_form, "SMALL", small)
            models = [adapted(model, fold, target_modules=["0", "3"]) for fold in (True, False)]
            agree(*models, torch.randn(2, 3, *size, dtype=torch.float64))
    assert len(folded) == 8


@pytest.mark.parametrize("dense", [True, False])
def test_channels_last(dense, off_cpu, monkeypatch, folded):
    """1×1 kernels are products there, with the bias in passing."""
    monkeypatch.setattr(conv_form, "dense_pays", lambda *given: dense)
    products, plain = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda b, *given, **o: products.append(b.dim()) or plain(b, *given, **o)
    )
    models = [adapted(network(), fold).to(memory_format=torch.channels_last) for fold in (True, False)]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    agree(*models, x)
    assert products.count(1) == 3 and len(folded) == 6  # not the one with a stride
    assert models[0](x).stride() == models[1](x).stride()


def test_training_is_the_same(off_cpu, folded):
    model, x = network(), torch.randn(4, 4, 6, 6, dtype=torch.float64)
    models = [adapted(model, fold) for fold in (True, False)]
    for one in models:
        optimizer = torch.optim.SGD(ll.lora_parameters(one), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    assert len(folded) == 18
    agree(*models, x)
    for got, wanted in zip(ll.lora_parameters(models[0]), ll.lora_parameters(models[1]), strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
def test_half_precision(weights, off_cpu, folded):
    model, x = network(), torch.randn(2, 4, 6, 6)
    exact = step(adapted(model, False), x.bfloat16().double())
    half = adapted(model, True).to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        found = step(half, x.to(weights))
    assert len(folded) == 6
    for got, wanted in zip(found, exact, strict=True):
        assert (got - wanted).norm() <= 0.03 * wanted.norm()


def test_second_derivatives(off_cpu):
    models = [adapted(network(), fold) for fold in (True, False)]
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for model in models:
        (dX,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dX.square().sum(), list(ll.lora_parameters(model))))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, off_cpu):
    model = network()
    models = [adapted(model, fold) for fold in (True, False)]

    class Checkpointed(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model[2:](checkpoint(self.model[:2], x, use_reentrant=reentrant))

    class Plain(Checkpointed):
        def forward(self, x):
            return self.model(x)

    agree(Checkpointed(models[0]), Plain(models[1]))


@pytest.mark.slow
def test_a_compiler_sees_both_and_folds_nothing(folded):
    model, x = adapted(network(), True), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert not folded
    torch.testing.assert_close(y, model(x), **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_on_a_gpu(last, folded):
    models = [adapted(network(), fold).cuda() for fold in (True, False)]
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, device="cuda")
    if last:
        models = [model.to(memory_format=torch.channels_last) for model in models]
        x = x.contiguous(memory_format=torch.channels_last)
    agree(*models, x)
    agree(*models, x)
    assert len(folded) == 12
