"""Layers behind a norm or an activation with the shipped threshold: an input of that many bytes is made again
in the backward, one sample fewer is kept, and the promises hold on both sides."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from lora_lightning.kernels import functional, sources

pytestmark = pytest.mark.shipped_threshold
WIDTH = 64


def fused_qkv() -> nn.Module:
    from timm.layers import Attention

    return Attention(WIDTH, num_heads=2)


CASES = {  # what makes the input, the adapted layer, the weight's name, the shape of a sample, options
    "Linear": (lambda: nn.LayerNorm(WIDTH), lambda: nn.Linear(WIDTH, 24), "1.weight", (WIDTH,), {}),
    "Linear-dora": (nn.GELU, lambda: nn.Linear(WIDTH, 24), "1.weight", (WIDTH,), {"use_dora": True}),
    "fused-qkv": (
        lambda: nn.LayerNorm(WIDTH), fused_qkv, "1.qkv.weight", (32, WIDTH), {"target_modules": ["qkv.v"]}
    ),
    "Conv1d": (nn.SiLU, lambda: nn.Conv1d(16, 24, 3, padding=1), "1.weight", (16, 64), {}),
    "Conv2d-groups": (nn.GELU, lambda: nn.Conv2d(16, 24, 3, groups=2), "1.weight", (16, 16, 16), {}),
}  # fmt: skip


@pytest.fixture
def remade(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each adapted layer's call with gradients that asks for it, whether its input is made again."""
    found = []

    def source_of(*args, **options):
        source = sources.source_of(*args, **options)
        found.append(source is not None)
        return source

    monkeypatch.setattr(functional, "source_of", source_of)
    return found


@pytest.mark.parametrize("again", [True, False], ids=["made again", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_the_promises_hold_on_both_sides_of_the_threshold(name, again, remade):
    maker, layer, weight, shape, options = CASES[name]
    model = nn.Sequential(maker(), layer()).double().train()
    base = copy.deepcopy(model)
    settings = {"rank": 2, "target_modules": ["1"], "modules_to_save": None, **options}
    ll.inject(model, ll.LoRAConfig(**settings))
    parameters = ll.lora_parameters(model)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3, mean=1.0 if parameter.dim() == 1 else 0.0)
    samples = sources.LEAST // (8 * torch.Size(shape).numel()) - (not again)
    x = torch.randn(samples, *shape, dtype=torch.float64, requires_grad=True)

    def gradients(outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outputs.square().mean(), (x, *parameters))

    outputs = model(x)
    assert remade == [True] * again
    effective = model.get_submodule(weight.rpartition(".")[0]).weight
    wanted = torch.func.functional_call(base, {weight: effective}, (x,))
    torch.testing.assert_close(outputs, wanted, rtol=1e-10, atol=1e-10)
    found = gradients(outputs)
    torch.testing.assert_close(found, gradients(wanted), rtol=1e-8, atol=1e-12)
    again_found = gradients(checkpoint(model, x, use_reentrant=False))
    torch.testing.assert_close(again_found, found, rtol=1e-10, atol=1e-14)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    assert {n for n in before if not torch.equal(after[n], before[n])} == {n for n in before if ".lora." in n}
    with ll.adapters_off(model), torch.no_grad():
        assert torch.equal(model(x), base(x))
