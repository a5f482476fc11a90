"""Convolutions and frozen norms by the rule of what is not a CPU, taken on one: values and calls."""

import pytest
import torch
from hypothesis import given, settings
from test_conv_kernel import BATCH_NORMS, FORMS, LAST, agree, convolutions, frozen, make
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lightning.kernels import conv_form
from lora_lightning.kernels.functional import lora_conv

pytestmark = pytest.mark.usefixtures("off_cpu")


@pytest.fixture(params=["dense", "merged"])
def form(request, monkeypatch):
    """Where the gradients of A and B come from."""
    monkeypatch.setattr(conv_form, "dense_pays", lambda *given: request.param == "dense")
    return request.param


class Calls(TorchDispatchMode):
    """The operators that are called, views and empty tensors left out."""

    FREE = {"view", "t", "transpose", "permute", "detach", "empty", "new_empty", "alias", "expand", "squeeze",
            "unsqueeze", "_unsafe_view", "as_strided", "slice", "select", "unbind"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.split("::")[1]
        if name not in self.FREE:
            self.names.append(name)
        return f(*args, **(kwargs or {}))


@given(convolutions())
@settings(max_examples=30, deadline=None)
def test_the_road_is_the_reference(case):
    shape, o, kernel, rank, options, across, dora, layout = case
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if layout == "last" and x.dim() in LAST:
        x = x.contiguous(memory_format=LAST[x.dim()])
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded" and x.numel():
        x = x[:1].expand(shape)
    tensors = make(shape[1], o, kernel, rank, options["groups"], across, dora=dora)
    agree(x.detach().requires_grad_(), tensors, **options)
    agree(x.detach(), tensors, **options)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", [n for n in FORMS if not n.startswith("branch")])
def test_both_ways_to_the_gradients(name, last, form):
    _, shape, o, kernel, options = FORMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    size = (kernel,) * (x.dim() - 2)
    W, *others = make(shape[1], o, size, 1, options.get("groups", 1), "depthwise" in name)
    if last and x.dim() in LAST:
        x, W = (t.contiguous(memory_format=LAST[x.dim()]) for t in (x, W))
    agree(x.requires_grad_(), (W, *others), **options)
    for frozen_factor in others[1:3]:  # each factor alone
        frozen_factor.requires_grad_(False)
        agree(x, (W, *others), **options)
        frozen_factor.requires_grad_(True)


@pytest.mark.parametrize("name", ["merged-1x1-stride", "branch-3x3", "dense-groups"])
def test_first_and_second_derivatives(name, form):
    _, _, _, kernel, options = FORMS[name]
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    W, bias, A, B, _ = make(4, 4, (kernel, kernel), 1, options.get("groups", 1))

    def function(x, bias, A, B):
        return lora_conv(x, W, bias, A, B, 0.7, **options)

    assert gradcheck(function, (x, bias, A, B)) and gradgradcheck(function, (x, bias, A, B))


@pytest.mark.parametrize(
    "name", ["branch-1x1", "branch-1x1-stride", "branch-3x3", "branch-groups", "branch-1d"]
)
def test_dropout(name, drops_alike, monkeypatch):
    def native(x, p, train):
        return drops_alike(x, p), drops_alike(torch.ones_like(x), p) > 0

    monkeypatch.setattr(torch, "native_dropout", native)
    _, shape, o, kernel, options = FORMS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    W, bias, A, B, _ = make(shape[1], o, (kernel,) * (x.dim() - 2), 1, options.get("groups", 1))
    agree(x, (W, bias, A, B, None), dropout=0.4, **options)


def test_dropout_of_torchs_own_has_its_probability():
    x = torch.ones(1, 4, 200, 200, requires_grad=True)
    W, _, A, B, _ = make(4, 4, (1, 1), 1, dtype=torch.float32)
    y = lora_conv(x, W.zero_(), None, torch.ones_like(A), torch.ones_like(B), dropout=0.25)
    assert abs(y.mean() - 4) < 0.02 and abs(y.max() - 4 / 0.75) < 1e-5
    (dX,) = torch.autograd.grad(y.sum(), x)
    assert {round(v, 4) for v in dX.unique().tolist()} == {0.0, round(4 / 0.75, 4)}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["merged-3x3", "merged-1x1", "dense-depthwise"])
def test_half_precision(name, weights, form):
    """W' is rounded once: the results are as near to the exact ones as bfloat16 is."""
    _, shape, o, kernel, options = FORMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16()
    across = "depthwise" in name
    tensors = make(shape[1], o, (kernel, kernel), 1, options.get("groups", 1), across, dtype=torch.float32)
    tensors = [t if t is None else t.detach() for t in tensors]
    tensors[0] = tensors[0].to(weights)
    tensors[1] = tensors[1].to(weights)
    exact = [t if t is None else t.double().requires_grad_(i > 0) for i, t in enumerate(tensors)]
    half = [t if t is None else t.requires_grad_(i > 0) for i, t in enumerate(tensors)]
    y = lora_conv(x.double(), *exact[:4], 0.7, implementation="reference", **options)
    dY = torch.randn(y.shape).bfloat16()
    wanted = y, *torch.autograd.grad(y, exact[1:4], dY.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        y = lora_conv(x.requires_grad_(), *half[:4], 0.7, **options)
    found = y, *torch.autograd.grad(y, half[1:4], dY)
    assert [t.dtype for t in found] == [torch.bfloat16, weights, torch.float32, torch.float32]
    for got, true in zip(found, wanted, strict=True):
        assert (got - true).norm() <= 0.006 * true.norm()


def test_an_update_of_zero_changes_no_bit():
    for weights in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8, 9, 9).to(weights)
        W, _, A, B, _ = make(8, 8, (3, 3), 2, dtype=torch.float32)
        B.data.zero_()
        y = lora_conv(x, W.to(weights), None, A, B)
        assert torch.equal(y, nn.functional.conv2d(x, W.to(weights)))


RESNET = [  # in, out, kernel, size of x: of ResNet-50; of a diffusion model's U-Net; of a VGG
    (64, 64, 1, 56, True), (64, 64, 3, 56, True), (128, 128, 3, 28, True), (256, 256, 3, 14, False),
    (512, 512, 3, 7, False), (2048, 512, 1, 7, True), (512, 2048, 1, 7, True), (1280, 1280, 3, 32, False),
    (4096, 4096, 1, 14, False),
]  # fmt: skip


@pytest.mark.parametrize(("i", "o", "kernel", "size", "dense"), RESNET)
def test_the_rule_by_arithmetic(i, o, kernel, size, dense):
    W = torch.empty(o, i, kernel, kernel, device="meta")
    given = 256 * size**2, 256 * size**2 * i, W, 1, 8
    assert conv_form.dense_pays(*given, torch.bfloat16) == dense
    assert conv_form.dense_pays(*given, torch.float16)


def test_the_rule_counts_calls():
    W = torch.empty(256, 256, 3, 3, device="meta")
    assert conv_form.dense_pays(8 * 14**2, 8 * 14**2 * 256, W, 1, 8, torch.bfloat16)


def test_the_rule_counts_operations_by_their_precision():
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    try:
        found = {}
        for precision in ("tf32", "ieee"):
            settings.fp32_precision = precision
            found[precision] = conv_form.operations_a_byte(torch.float32)
    finally:
        settings.fp32_precision = before
    assert found == {"tf32": 100, "ieee": 20} and conv_form.operations_a_byte(torch.bfloat16) == 200
    assert conv_form.operations_a_byte(torch.float64) == 20


def test_the_calls_of_a_layer():
    """Forward W' and the convolution; backward one call for dX and dW', one product for each factor."""
    x = torch.randn(2, 16, 8, 8).bfloat16().requires_grad_()
    W, _, A, B, _ = make(16, 16, (3, 3), 2, dtype=torch.float32)
    W = W.bfloat16()
    lora_conv(x, W, None, A, B, padding=1)  # which draws the dither
    with Calls() as forward:
        y = lora_conv(x, W, None, A, B, padding=1)
    dY = torch.randn_like(y)
    with Calls() as backward:
        torch.autograd.grad(y, (x, A, B), dY)
    assert forward.names.count("convolution") == 1 and len(forward.names) <= 6
    assert sorted(backward.names) == ["_to_copy", "addmm", "addmm", "convolution_backward"]


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_norms_gradient_is_one_call(name, dtype):
    build, shape = BATCH_NORMS[name]
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    found = []
    for implementation in ("auto", "reference"):
        y = frozen(build, implementation, dtype)(x)
        dY = torch.ones_like(y)
        with Calls() as backward:
            found.append((y, torch.autograd.grad(y, x, dY)[0]))
        if implementation == "auto" and name != "timm":  # its activation has a gradient of its own
            assert backward.names == ["native_batch_norm_backward"]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10 if dtype == torch.float64 else 0.01, atol=1e-12)


def test_a_frozen_norm_has_second_derivatives():
    norm = frozen(lambda: nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(norm, x) and gradgradcheck(norm, x)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_float16_does_not_overflow(rate, drops_alike, monkeypatch):
    """conv(x, A) would be 80,000; what it is made of is not."""
    monkeypatch.setattr(
        torch, "native_dropout", lambda x, p, t: (drops_alike(x, p), drops_alike(torch.ones_like(x), p) > 0)
    )
    torch.manual_seed(0)
    x = (100 * torch.rand(2, 8, 6, 6)).half()
    W, _, A, B, _ = (t if t is None else t.detach() for t in make(8, 8, (3, 3), 2, dtype=torch.float32))
    A, B = A.abs() * 15, B * 1e-3
    found = []
    for dtype in (torch.float64, torch.float16):
        given = [t.to(torch.float32 if dtype == torch.float16 else dtype).requires_grad_() for t in (A, B)]
        source = x.to(dtype).requires_grad_()
        way = "auto" if dtype == torch.float16 else "reference"
        y = lora_conv(source, W.to(dtype), None, *given, dropout=rate, implementation=way)
        found.append((y, *torch.autograd.grad((y.float() * 1e-3).sum(), (source, *given))))
    for got, wanted in zip(found[1], found[0], strict=True):
        assert (got - wanted).norm() <= 0.01 * wanted.norm()
