"""Half precision: the branch is finite where the merged form is, and DoRA begins as the very base."""

import pytest
import torch
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels.half import LARGEST, shared_out

IMAGE = (2, 64, 6, 6)
LAYERS = {
    "linear": (lambda: nn.Linear(512, 64), lambda: 60 * torch.randn(8, 512)),
    "conv": (lambda: nn.Conv2d(64, 32, 3, padding=1), lambda: 60 * torch.randn(IMAGE)),
    "circular": (
        lambda: nn.Conv2d(64, 32, 3, padding=1, padding_mode="circular"),
        lambda: 60 * torch.randn(IMAGE),
    ),
    "pointwise": (lambda: nn.Conv2d(64, 32, 1), lambda: 480 * torch.randn(IMAGE)),
    "grouped": (lambda: nn.Conv2d(64, 32, 3, groups=2), lambda: 120 * torch.randn(IMAGE)),
    "transposed": (lambda: nn.ConvTranspose2d(64, 32, 3, groups=2), lambda: 480 * torch.randn(IMAGE)),
}
TABLES = {
    "embedding": (lambda: nn.Embedding(20, 32), lambda: torch.randint(0, 20, (4, 5))),
    "bag": (lambda: nn.EmbeddingBag(20, 32, mode="sum"), lambda: torch.randint(0, 20, (4, 5))),
}


def adapted(layer: nn.Module, **options) -> nn.Module:
    settings = {"rank": 2, "alpha": 1, "target_modules": ["0"], "modules_to_save": None, **options}
    model = nn.Sequential(layer)
    ll.inject(model, ll.LoRAConfig(**settings))
    return model.eval()


def fill(model: nn.Module, A: float, B: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=A if "lora_A" in name else B)


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("options", [{}, {"implementation": "reference"}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *TABLES])
def test_the_branch_is_finite_where_the_merged_form_is(name, options, autocast):
    build, batch = {**LAYERS, **TABLES}[name]
    if name in (*TABLES, "transposed") and options.get("use_dora"):
        pytest.skip("not a layer for DoRA's branch")
    large = 1e5 if name in TABLES else 40.0
    model, x = adapted(build() if autocast else build().half(), **options), batch()
    fill(model, large, 1e-4)
    x = x if autocast or name in TABLES else x.half()
    live = []
    for grad in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=autocast), torch.set_grad_enabled(grad):
            live.append(model(x).detach())
    ll.add_adapter(model, "other")  # the sum of two, and rows of each
    ll.set_adapter(model, "default", "other")
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        live.append(model(x))
        if name != "bag":
            with ll.mixed_adapters(model, ["default"] * len(x)):
                live.append(model(x))
            with ll.mixed_adapters(model, ["default", None] * (len(x) // 2)):
                live.append(torch.stack([model(x)[0]] * len(x)))
        ll.merge(model)
        merged = model(x)
    assert torch.isfinite(merged).all()
    expected = [merged] * 4 + [torch.stack([merged[0]] * len(x))]
    for one, other in zip(live, expected, strict=False):
        assert (one - other).norm() <= 4e-3 * other.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_float16_are_those_of_float32(name):
    build, batch = LAYERS[name]
    gradients = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        model = adapted(build())
        fill(model, 2.0, 1e-3)  # A's rows sum up to hundreds
        model.to(dtype)
        for parameter in ll.lora_parameters(model):
            parameter.data = parameter.data.float()
        torch.manual_seed(1)
        model(0.01 * batch().to(dtype)).float().square().sum().backward()
        gradients.append([p.grad.float() for p in ll.lora_parameters(model)])
    for half, single in zip(*gradients, strict=True):
        assert (half - single).norm() <= 2e-2 * single.norm()


@pytest.mark.parametrize("A", [0.0, 1e-6, 1e-2, 10.0, 1e4])
@pytest.mark.parametrize("B", [0.0, 1e-6, 1.0, 1e5])
@pytest.mark.parametrize("groups", [1, 3])
def test_factors_shared_out_are_the_same_update_and_fit_float16(A, B, groups):
    down, up = A * torch.randn(groups * 2, 40), B * torch.randn(groups * 5, 2)
    shared_down, shared_up, _ = shared_out(down, up, 0.5, torch.float16)
    shape = (groups, 5, 2), (groups, 2, 40)
    product = torch.bmm(shared_up.view(shape[0]), shared_down.view(shape[1]))
    wanted = 0.5 * torch.bmm(up.view(shape[0]), down.view(shape[1]))
    assert (product - wanted).norm() <= 1e-6 * wanted.norm()
    assert shared_up.abs().max() <= LARGEST
    # A·x overflows only where B has its largest entries, and so where s·B·A·x does
    small = shared_down.abs().sum(1) <= 0.5 + 1e-6
    tops = shared_up.view(groups, 5, 2).abs().amax(1).flatten()
    assert (small | (tops >= LARGEST * (1 - 1e-6))).all()
    assert shared_out(down, up, 0.5, torch.bfloat16)[0] is down


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", ["linear", "conv", "circular", "pointwise", "depthwise"])
def test_dora_with_a_bias_begins_as_the_base_bit_for_bit(name, implementation, dtype):
    depthwise = (lambda: nn.Conv2d(64, 64, 3, groups=64), lambda: torch.randn(IMAGE))
    build, batch = {**LAYERS, "depthwise": depthwise}[name]
    layer, x = build().to(dtype), batch().to(dtype) / 60
    with torch.no_grad():
        base = layer(x)
        model = adapted(layer, use_dora=True, implementation=implementation)
        assert torch.equal(model(x), base)
        with ll.mixed_adapters(model, ["default", None] * (len(x) // 2)):
            assert torch.equal(model(x), base)
