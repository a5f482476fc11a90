"""Adapted layers: settings of Linear and Conv2d, references to them, and what cannot be adapted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lightning as ll


def adapted(layer: nn.Module, **options) -> nn.Module:
    model = nn.Sequential(layer)
    ll.inject(
        model, ll.LoRAConfig(**{"rank": 2, "target_modules": ["0"], "modules_to_save": None, **options})
    )
    with torch.no_grad():
        for parameter in ll.lora_parameters(model):
            if parameter.dim() > 1:
                parameter.normal_()
    return model[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dora", [False, True])
def test_conv2d_equals_a_convolution_with_the_effective_weight(settings, dora):
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 4, **settings).double()
    reference = nn.Conv2d(3, 4, **settings).double()
    layer = adapted(layer, use_dora=dora)
    reference.load_state_dict(
        {"weight": layer.weight, **({"bias": layer.bias} if layer.bias is not None else {})}
    )
    for shape in ((2, 3, 9, 8), (3, 9, 8)):  # batched and not
        x = torch.randn(*shape).double()
        torch.testing.assert_close(layer(x), reference(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5), (0, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_linear_equals_a_product_with_the_effective_weight(shape, bias, dora):
    layer = adapted(nn.Linear(5, 4, bias=bias).double(), use_dora=dora)
    x = torch.randn(*shape).double()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("build", [lambda: nn.Linear(5, 4), lambda: nn.Conv2d(3, 4, 3)])
@pytest.mark.parametrize("dora", [False, True])
def test_gradcheck(build, dora):
    layer = adapted(build().double(), use_dora=dora)
    x = torch.randn(2, 5).double() if isinstance(layer, nn.Linear) else torch.randn(1, 3, 4, 4).double()
    update = layer.lora["default"]["weight"]
    if dora:  # the norm is held constant in the backward: the update's own gradient is not the full one
        torch.autograd.gradcheck(lambda x: layer(x), (x.requires_grad_(),))
        return
    names = ["lora_A", "lora_B"]

    def run(x, *values):
        return torch.func.functional_call(
            layer, dict(zip((f"lora.default.weight.{n}" for n in names), values)), (x,)
        )

    torch.autograd.gradcheck(run, (x.requires_grad_(), update.lora_A, update.lora_B))


def test_the_layer_is_the_same_object_of_a_subclass_of_its_class():
    class Mine(nn.Linear):
        def shout(self) -> str:
            return "mine"

    layer = Mine(5, 4)
    weight, calls = layer.weight, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    other_reference = layer
    same = adapted(layer)
    assert same is layer is other_reference
    assert isinstance(layer, Mine) and type(layer).__name__ == "LoRAMine"
    assert layer.shout() == "mine"
    assert layer.state_dict()["weight"].data_ptr() == weight.data_ptr()
    layer(torch.randn(1, 5))
    assert calls == [1]
    assert dict(layer.named_parameters())["weight"] is weight
    assert not torch.equal(layer.weight, weight)


def test_the_base_weight_gets_no_gradient():
    layer = adapted(nn.Linear(5, 4))
    layer(torch.randn(3, 5)).sum().backward()
    F.linear(torch.randn(3, 5), layer.weight).sum().backward()
    assert layer.base_weight("weight").grad is None
