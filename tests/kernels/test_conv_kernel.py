"""lora_conv and the frozen BatchNorm against plain autograd, bit for bit or in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import lora_lightning as ll
from lora_lightning.kernels import conv_form
from lora_lightning.kernels.functional import lora_conv
from lora_lightning.layers.norm import FrozenNorm, freeze_statistics

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def make(i, o, kernel, rank, groups=1, across=False, dtype=torch.float64, dora=False):
    """W, bias, A, B and a magnitude or None; all but W require a gradient."""
    size = (kernel,) if isinstance(kernel, int) else tuple(kernel)
    W = torch.randn(o, i // groups, *size, dtype=dtype)
    A = torch.randn((1 if across else groups) * rank, i // groups, *size, dtype=dtype)
    factors = [torch.randn(o, dtype=dtype), A, torch.randn(o, rank, dtype=dtype)]
    factors += [torch.rand(o, dtype=dtype) + 0.5] if dora else []
    bias, A, B, *m = (t.requires_grad_() for t in factors)
    return W, bias, A, B, m[0] if m else None


def gradients(x, W, bias, A, B, m, scaling=0.7, **options):
    inputs = [t for t in (x, bias, A, B, m) if t is not None and t.requires_grad]
    y = lora_conv(x, W, bias, A, B, scaling, magnitude=m, **options)
    torch.manual_seed(3)
    return y.detach(), *torch.autograd.grad((y * torch.randn(y.shape, dtype=y.dtype)).sum(), inputs)


def agree(x, tensors, **options):
    fast, plain = (gradients(x, *tensors, implementation=k, **options) for k in ("auto", "reference"))
    for got, wanted in zip(fast, plain, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [1, (3, 3)])
def test_the_magnitude_of_a_kernel_of_zeros_has_the_gradient_zero(kernel, bias):
    W, b, *rest = make(16, 16, (kernel,) * 2 if kernel == 1 else kernel, 1, dora=True)
    with torch.no_grad():
        for tensor in (W, rest[1], rest[2]):
            tensor[1] = 0
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    agree(x, (W, b if bias else None, *rest))
    assert gradients(x, W, b if bias else None, *rest)[-1].count_nonzero() == 15


@st.composite
def convolutions(draw):
    dimensions, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 1, 2, 4]))
    each = st.tuples(*[st.integers(1, 3)] * dimensions)
    kernel, stride, dilation = draw(each), draw(each), draw(each)
    padding = draw(st.one_of(st.tuples(*[st.integers(0, 3)] * dimensions), st.just("valid")))
    if draw(st.booleans()):
        kernel = (1,) * dimensions
    if draw(st.booleans()):
        stride, padding = (1,) * dimensions, draw(st.sampled_from(["same", padding]))
    size = tuple(d * (k - 1) + draw(st.integers(1, 5)) for d, k in zip(dilation, kernel, strict=True))
    i, o, rank = (groups * draw(st.integers(1, 5)) for _ in range(2)), None, draw(st.integers(1, 3))
    i, o = i
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    across = groups == i and draw(st.booleans())
    dora, batch = draw(st.booleans()), draw(st.integers(0, 3))
    layout = draw(st.sampled_from(["contiguous", "last", "transposed", "expanded"]))
    return (batch, i, *size), o, kernel, rank, options, across, dora, layout


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_the_fast_path_is_the_reference(case):
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


# One for each form and way of computing the factors: products and convolutions.
FORMS = {
    "merged-1x1": ("merged", (2, 12, 30, 30), 12, 1, {}),
    "merged-1x1-stride": ("merged", (2, 12, 30, 30), 12, 1, {"stride": 2}),
    "merged-3x3": ("merged", (2, 12, 30, 30), 12, 3, {"padding": 1}),
    "merged-3x3-stride": ("merged", (2, 12, 60, 60), 12, 3, {"padding": 2, "stride": 2, "dilation": 2}),
    "merged-groups": ("merged", (2, 24, 30, 30), 24, 3, {"groups": 2}),
    "branch-1x1": ("branch", (2, 12, 2, 2), 12, 1, {}),
    "branch-1x1-stride": ("branch", (2, 12, 3, 3), 12, 1, {"stride": 2}),
    "branch-3x3": ("branch", (2, 12, 4, 3), 12, 3, {"padding": 1}),
    "branch-3x3-stride": ("branch", (2, 12, 4, 3), 12, 3, {"padding": 1, "stride": 2}),
    "branch-groups": ("branch", (2, 24, 4, 4), 24, 3, {"groups": 2}),
    "branch-1d": ("branch", (2, 12, 9), 12, 4, {"padding": "same"}),
    "merged-3d": ("merged", (1, 8, 9, 9, 9), 8, 3, {"padding": 1}),
    "dense-groups": ("dense", (2, 8, 6, 6), 8, 3, {"groups": 4}),
    "dense-depthwise": ("dense", (2, 8, 6, 6), 8, 3, {"groups": 8}),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form(name, last, monkeypatch):
    form, shape, o, kernel, options = FORMS[name]
    chosen = []
    monkeypatch.setattr(
        "lora_lightning.kernels.functional.choose_form",
        lambda *a: chosen.append(conv_form.choose_form(*a)) or chosen[-1],
    )
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if last and x.dim() in LAST:
        x = x.contiguous(memory_format=LAST[x.dim()])
    size = (kernel,) * (x.dim() - 2)
    tensors = make(shape[1], o, size, 1, options.get("groups", 1), "depthwise" in name)
    agree(x.requires_grad_(), tensors, **options)
    assert set(chosen) == {form, "reference"}
    for frozen in tensors[2:4]:  # each factor alone
        frozen.requires_grad_(False)
        agree(x, tensors, **options)
        frozen.requires_grad_(True)


@pytest.mark.parametrize("name", [n for n in FORMS if "dense" not in n])
def test_dropout_keeps_the_same_entries_forward_and_backward(name, drops_alike):
    _, shape, o, kernel, options = FORMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    W, bias, A, B, _ = make(shape[1], o, (kernel,) * (x.dim() - 2), 1, options.get("groups", 1))
    outputs = []
    for way in ("auto", "reference"):
        outputs.append(gradients(x, W, bias, A, B, None, dropout=0.4, implementation=way, **options))
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["merged-1x1-stride", "branch-3x3", "dense-groups", "dora"])
def test_first_and_second_derivatives(name):
    dora = name == "dora"
    form, _, _, kernel, options = FORMS["branch-3x3" if dora else name]
    groups, channels = options.get("groups", 1), 4 if form == "dense" else 6
    torch.manual_seed(0)
    positions = 9 if form == "merged" else 3
    x = torch.randn(1, channels, positions, 3, dtype=torch.float64, requires_grad=True)
    W, bias, A, B, m = make(channels, channels, (kernel, kernel), 1, groups, dora=dora)
    inputs = [t for t in (x, bias, A, B, m) if t is not None]

    def function(x, bias, A, B, m=None):
        return lora_conv(x, W, bias, A, B, 0.7, magnitude=m, **options)

    if dora:  # its norms are held constant, which finite differences do not know
        A.requires_grad_(False), B.requires_grad_(False)
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", [n for n in FORMS if "depthwise" not in n])
def test_dora(name, bias):
    _, shape, o, kernel, options = FORMS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    W, b, *others = make(shape[1], o, (kernel,) * (x.dim() - 2), 1, options.get("groups", 1), dora=True)
    agree(x, (W, b if bias else None, *others), **options)


@pytest.mark.parametrize("change", [torch.Tensor.relu_, lambda y: y.mul_(2)], ids=["relu", "double"])
def test_doras_output_may_be_changed_in_place(change):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 9, 9, dtype=torch.float64, requires_grad=True)
    W, _, *others = make(12, 12, (3, 3), 1, dora=True)
    found = []
    for implementation in ("auto", "reference"):
        y = lora_conv(
            x, W, None, others[0], others[1], 0.7, magnitude=others[2], implementation=implementation
        )
        y = change(y)
        found.append(torch.autograd.grad(y.square().sum(), (x, *others)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_what_is_saved_is_the_input_alone():
    x = torch.randn(2, 16, 20, 20, requires_grad=True)
    W, bias, A, B, _ = make(16, 16, (3, 3), 2, dtype=torch.float32)
    own = {t.data_ptr() for t in (W, bias, A, B)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_conv(x, W, bias, A, B, padding=1)
    assert [t.data_ptr() for t in saved if t.data_ptr() not in own] == [x.data_ptr()]


@pytest.mark.parametrize("function", [F.silu, F.gelu])
def test_an_input_that_can_be_made_again_is_not_saved(function):
    x = torch.randn(2, 16, 20, 20, requires_grad=True)
    tensors = make(16, 16, (1, 1), 2, dtype=torch.float32)
    found = {}
    for implementation in ("auto", "keep_inputs"):
        u = function(x)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            y = lora_conv(u, *tensors[:4], implementation=implementation)
        found[implementation] = (
            u.data_ptr() in saved,
            *torch.autograd.grad(y.square().sum(), (x, *tensors[1:4])),
        )
    assert not found["auto"][0] and found["keep_inputs"][0]
    assert all(torch.equal(a, b) for a, b in zip(found["auto"][1:], found["keep_inputs"][1:], strict=True))


@pytest.mark.parametrize("inside", [False, True], ids=["float32-input", "bfloat16-input"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_adds_the_update(kernel, inside):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 6, 6)
    W, bias, A, B, _ = make(12, 12, (kernel, kernel), 2, dtype=torch.float32)
    exact = lora_conv(x, W, bias, A, B, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_conv(x.bfloat16() if inside else x, W, bias, A, B, 0.7)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() <= 0.02 * exact.abs().max()
    gradients = torch.autograd.grad(y.float().sum(), (bias, A, B))
    assert {g.dtype for g in gradients} == {torch.float32}
    for got, wanted in zip(gradients, torch.autograd.grad(exact.sum(), (bias, A, B)), strict=True):
        assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_function_transforms_and_forward_mode_take_the_reference():
    x = torch.randn(3, 6, 5, 5, dtype=torch.float64)
    W, bias, A, B, _ = (t if t is None else t.detach() for t in make(6, 6, (3, 3), 2))

    def loss(B, x):
        return lora_conv(x, W, bias, A, B).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(B, x)
    torch.testing.assert_close(each.sum(0), torch.func.grad(loss)(B, x))
    assert torch.func.jvp(loss, (B, x), (B, x))[1].ndim == 0


BATCH_NORMS = {
    "1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "1d-sequence": (lambda: nn.BatchNorm1d(6), (4, 6, 7)),
    "2d": (lambda: nn.BatchNorm2d(6), (4, 6, 5, 5)),
    "2d-without-affine": (lambda: nn.BatchNorm2d(6, affine=False), (4, 6, 5, 5)),
    "3d": (lambda: nn.BatchNorm3d(6), (2, 6, 3, 4, 5)),
    "sync": (lambda: nn.SyncBatchNorm(6), (4, 6, 5, 5)),
    "timm": (lambda: __import__("timm").layers.BatchNormAct2d(6), (4, 6, 5, 5)),
}


def frozen(build, implementation="auto", dtype=torch.float64):
    torch.manual_seed(0)
    norm = build().to(dtype).requires_grad_(False)
    for tensor in (norm.running_mean, norm.running_var, *norm.parameters()):
        tensor.uniform_(0.5, 2)
    freeze_statistics(norm, implementation)
    assert isinstance(norm, FrozenNorm)
    return norm


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_batch_norm_saves_nothing(name, dtype):
    build, shape = BATCH_NORMS[name]
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    saved = {}
    outputs = {}
    for implementation in ("auto", "reference"):
        norm = frozen(build, implementation, dtype)
        saved[implementation] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved[implementation]: s.append(t.data_ptr()) or t, lambda t: t
        ):
            y = norm(x)
        outputs[implementation] = y, torch.autograd.grad(y.square().sum(), x)[0]
        assert torch.equal(y, norm(x.detach()))
    assert x.data_ptr() in saved["reference"] and x.data_ptr() not in saved["auto"]
    (y, dX), (exact_y, exact_dX) = outputs["auto"], outputs["reference"]
    assert torch.equal(y, exact_y)
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(dX, exact_dX, **tolerance)
    assert dX.dtype == dtype


def test_a_frozen_batch_norm_has_second_derivatives_and_refuses_as_its_base():
    norm = frozen(lambda: nn.BatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(norm, x) and gradgradcheck(norm, x)
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(x[0])


def test_a_batch_norm_whose_affine_trains_gets_its_gradients():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], train_norm="affine"))
    model.train()(torch.randn(4, 3, 4, 4)).square().sum().backward()
    assert model[1].weight.grad.any() and model[1].bias.grad.any()


def test_the_reference_can_be_chosen_for_a_whole_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0"], implementation="reference"))
    names = set()
    todo = [model.train()(torch.randn(4, 3, 4, 4)).sum().grad_fn]
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [n for n, _ in node.next_functions if n]
    assert "NativeBatchNormBackward0" in names and not any("Conv" in n and "Fact" in n for n in names)
