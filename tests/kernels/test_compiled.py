"""What a compiler is given off the CPU: its values, the rule of its forms, and that it is compiled once."""

import pytest
import torch
from small import cnn, vit
from test_conv_kernel import gradients as conv_gradients
from test_conv_kernel import make
from test_linear import arguments, assert_same, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lightning as ll
from lora_lightning.kernels import common, compiled, functional
from lora_lightning.kernels.compiled import cheapest, dithered
from lora_lightning.kernels.conv import FORMS
from lora_lightning.kernels.functional import lora_conv, lora_linear

pytestmark = pytest.mark.usefixtures("off_cpu")
ALL = ("extended", "dense", "plain")


@pytest.fixture(params=["dense", "extended"])
def form(request, monkeypatch):
    """Each form, whatever the rule says, and where there is no such one "dense"."""
    pick = lambda *args: request.param if request.param in args[-1] else "dense"  # noqa: E731
    monkeypatch.setattr(compiled, "cheapest", pick)
    return request.param


@pytest.fixture
def no_branch(monkeypatch):
    """From when it is called the reference, a branch, is not to be had."""

    def leave() -> None:
        monkeypatch.setattr(functional, "plain", None)
        monkeypatch.setitem(FORMS, "reference", None)

    return leave


def compiling(function, backend="eager"):
    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 5, 6), {}), ((6,), {"bias": False, "trains": ("A", "B")}), ((4, 6), {"dora": True})],
)
def test_a_linear_layer_equals_the_reference(form, no_branch, shape, options):
    given = arguments(shape, **options)
    wanted = gradients(given, implementation="reference")
    no_branch()
    fast = compiling(lambda **tensors: lora_linear(**tensors, scaling=2.0))
    y = fast(**given)
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    got = [y, *torch.autograd.grad((y.square() * weights).sum(), trained)]
    assert_same(got, wanted)


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"groups": 4, "across": True}, {"dora": True}])
def test_a_convolution_equals_the_reference(no_branch, options, monkeypatch):
    monkeypatch.setattr(compiled, "cheapest", lambda *args: "dense")
    tensors = make(4, 8, (3, 3), 2, **options)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    settings = {"stride": 2, "padding": 1, "groups": options.get("groups", 1)}
    wanted = conv_gradients(x, *tensors, implementation="reference", **settings)
    W, bias, A, B, m = tensors
    no_branch()
    y = compiling(lambda x: lora_conv(x, W, bias, A, B, 0.7, magnitude=m, **settings))(x)
    torch.manual_seed(3)
    weights = torch.randn(y.shape, dtype=y.dtype)
    inputs = [t for t in (x, bias, A, B, m) if t is not None]
    got = [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]
    assert_same(got, wanted)


@pytest.mark.parametrize(
    ("tokens", "d_in", "d_out", "picked"),
    [
        (128 * 197, 768, 2304, "extended"),
        (128 * 197, 384, 1536, "dense"),
        (197, 768, 3072, "dense"),
        (197, 4096, 4096, "plain"),
        (8192, 4096, 4096, "extended"),
    ],
)
def test_the_rule(tokens, d_in, d_out, picked):
    assert cheapest(tokens, d_in, d_out, d_in * d_out, torch.bfloat16, 20, ALL) == picked


def test_the_rule_without_gradients_merges_for_many_tokens():
    with torch.no_grad():
        picked = [cheapest(t, 4096, 4096, 4096**2, torch.bfloat16, 20, ALL) for t in (16, 2**14)]
    assert picked == ["plain", "extended"]


def test_dropout_and_a_cpu_keep_the_branch(monkeypatch):
    given = arguments()
    monkeypatch.setattr(compiled, "linear", None)
    compiling(lambda **tensors: lora_linear(**tensors, dropout=0.5))(**given)
    monkeypatch.setattr(common, "on_cpu", lambda device: True)
    compiling(lambda **tensors: lora_linear(**tensors))(**given)


def test_a_symbolic_number_of_tokens_is_compiled_once(no_branch):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    given = arguments((5, 6), dtype=torch.float32)
    no_branch()
    fast = compiling(lambda x: lora_linear(**{**given, "x": x}), count)
    for tokens in (5, 300, 7, 100_000, 11):
        x = torch.randn(tokens, 6)
        torch.testing.assert_close(fast(x), lora_linear(**{**given, "x": x}), rtol=1e-4, atol=1e-4)
    assert len(graphs) <= 2  # of the first number, and of any
    x = torch.randn(9, 6)
    torch._dynamo.mark_dynamic(x, 0)
    compiling(lambda x: lora_linear(**{**given, "x": x}))(x)  # torch refuses what is fixed to one range


def test_small_updates_of_half_precision_weights_are_kept_in_the_mean():
    W = torch.randn(300, 200).bfloat16()
    step = 0.2 * W.abs().float() * 2**-8  # rounding to nearest would keep about none of it
    moved = dithered(W.float() + step, torch.bfloat16).float() - W.float()
    assert 0.9 < float(moved.sum() / step.sum()) < 1.1
    assert torch.equal(dithered(W.float(), torch.bfloat16), W)
    odd = torch.tensor([float("nan"), -0.0, 0.0])
    assert dithered(odd, torch.float16)[0].isnan() and dithered(odd, torch.float16)[1:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_as_exact_as_a_cast(form, no_branch, dtype):
    given = arguments((64, 32), 48, 4, dtype=torch.float32, trains=())
    wanted = lora_linear(**given, implementation="reference")
    half = {
        k: t.to(dtype) if k in ("x", "weight", "bias") else t.requires_grad_()
        for k, t in given.items()
        if t is not None
    }
    y = compiling(lambda **tensors: lora_linear(**tensors))(**half)
    assert y.dtype == dtype
    assert (y.float() - wanted).norm() < 0.02 * wanted.norm()
    y.float().square().sum().backward()
    exact = {k: None if t is None else t.detach().clone().requires_grad_(k in "AB") for k, t in given.items()}
    lora_linear(**exact, implementation="reference").square().sum().backward()
    for name in "AB":
        assert (half[name].grad - exact[name].grad).norm() < 0.03 * exact[name].grad.norm()


def stepped(model, x, function):
    model.zero_grad()
    y = function(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in ll.lora_parameters(model))]


def filled(build, **options):
    model = build().eval()
    ll.inject(model, ll.LoRAConfig(rank=2, modules_to_save=None, **options))
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model


def two(model):
    ll.add_adapter(model, "two", ll.LoRAConfig(rank=1, target_modules=["0", "2"], modules_to_save=None))
    ll.set_adapter(model, "default", "two")
    for parameter in ll.lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


@pytest.mark.parametrize("form", ["extended", pytest.param("dense", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("how", ["several", "checkpointed", "autocast"])
def test_a_model_computes_what_it_does_otherwise(form, no_branch, how):
    model = mlp()
    model = filled(lambda: model, target_modules=["0", "2"])
    if how == "several":
        two(model)
    x = torch.randn(5, 6)
    run = (lambda x: checkpoint(model, x, use_reentrant=False)) if how == "checkpointed" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        wanted = stepped(model, x, model)
        no_branch()
        got = stepped(model, x, compiling(run))
    tolerance = 0.05 if how == "autocast" else 1e-4
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and (one - other).float().norm() <= tolerance * other.float().norm()


def test_a_quantized_layer_computes_what_it_does_otherwise(form, no_branch):
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    ll.quantize(base, "int8")
    model, x = filled(lambda: base, target_modules=["0"]), torch.randn(3, 64)
    wanted = stepped(model, x, model)
    no_branch()
    for one, other in zip(stepped(model, x, compiling(model)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("build", [vit, cnn])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"dropout": 0.1}], ids=["", "dora", "dropout"])
def test_whole_models_by_inductor(build, options, no_branch):
    """In one graph, with the gradients of eager mode; dropout in eval mode."""
    model, x = filled(build, **options), torch.randn(2, 3, 16, 16)
    wanted = stepped(model, x, model)
    if "dropout" not in options:
        no_branch()
    for one, other in zip(stepped(model, x, compiling(model, "inductor")), wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6
