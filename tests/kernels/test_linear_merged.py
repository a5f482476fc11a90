"""The form of linear layers off the CPU is held to plain autograd, in every backward of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import vit
from test_linear import arguments, assert_same, call, gradients, spec_arguments
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels import functional
from lora_lightning.kernels.functional import lora_linear
from lora_lightning.kernels.linear_form import linear_spec
from lora_lightning.kernels.quantized_tensor import QuantizedTensor
from lora_lightning.layers.registry import lora_layers

pytestmark = pytest.mark.usefixtures("off_cpu")
TRAINS = ("x", "bias", "A", "B", "magnitude")


@pytest.fixture(params=["dense", "extended", "packed", "apart"])
def backward(request, monkeypatch):
    """Each backward, whatever the rule says."""
    rule = functional.linear_spec

    def chosen(*args):
        spec, packed = rule(*args), request.param == "packed"
        if spec.form != "merged" or args[6] is not None:
            return spec
        return spec._replace(backward="extended" if packed else request.param, packed=packed)

    monkeypatch.setattr(functional, "linear_spec", chosen)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    trains=st.sets(st.sampled_from(TRAINS)),
    expanded=st.booleans(),
)
def test_equals_the_reference(backward, shape, sizes, bias, trains, expanded):
    d_in, d_out, rank = sizes
    given = arguments((*shape, d_in), d_out, rank, bias, trains=trains)
    if expanded:
        given["x"] = torch.randn(d_in).double().expand(*shape, d_in).requires_grad_("x" in trains)
    assert_same(gradients(given), gradients(given, implementation="reference"))


@pytest.mark.parametrize("trains", [TRAINS, ("magnitude",), ("x", "A")])
def test_dora_equals_the_reference(trains):
    given = arguments((3, 5, 6), dora=True, trains=trains)
    assert linear_spec(*spec_arguments(given)).form == "merged"
    assert_same(gradients(given), gradients(given, implementation="reference"))


def test_gradients_once_and_twice(backward):
    given = [t for t in arguments((5, 6)).values() if t is not None]
    given[1] = given[1].detach()
    run = lambda x, W, bias, A, B: lora_linear(x, W, bias, A, B, 2.0)  # noqa: E731  # a name for two checks
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_a_change_of_nothing_changes_nothing():
    given = arguments((7, 6), d_out=5, dtype=torch.bfloat16)
    given["A"], given["B"] = given["A"].detach().float(), torch.zeros(5, 2)
    assert torch.equal(call(given), F.linear(given["x"], given["weight"], given["bias"]))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(backward, dtype, autocast, dora):
    torch.manual_seed(1)
    given = arguments((64, 48), d_out=40, rank=4, dora=dora, dtype=torch.float32, trains=())
    exact = {n: None if t is None else t.double() for n, t in given.items()}
    if not autocast:
        given |= {n: given[n].to(dtype) for n in ("x", "weight", "bias")}
        exact |= {n: given[n].double() for n in ("x", "weight", "bias")}
    for made in (given, exact):
        for name in ("x", "A", "B", *(["magnitude"] if dora else [])):
            made[name].requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = gradients(given)
    assert all(t.dtype == torch.float32 for t in found[2:]) and found[0].dtype == dtype
    for one, other in zip(found, gradients(exact, implementation="reference"), strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < (0.012 if dtype == torch.bfloat16 else 0.003)


def test_float16_does_not_overflow_where_the_update_is_small():
    given = arguments((8, 48), d_out=40, rank=4, dtype=torch.float32, trains=())
    given["A"], given["B"] = 3e4 * given["A"], 1e-6 * given["B"]
    given |= {n: given[n].half() for n in ("x", "weight", "bias")}
    for name in ("A", "B"):
        given[name].requires_grad_()
    y = call(given)
    y.float().sum().backward()
    for gradient in (y, given["A"].grad, given["B"].grad):
        assert torch.isfinite(gradient).all()


def test_the_rule_counts_what_a_gpu_moves():
    """In half precision; (d_in, d_out), and whether a layer norm's backward comes next."""
    norm = nn.LayerNorm(768).bfloat16()

    def backward(d_in, d_out, normed=False, dtype=torch.bfloat16):
        x = torch.randn(4096, d_in, dtype=dtype, requires_grad=True)
        W, A, B = torch.zeros(d_out, d_in, dtype=dtype), torch.zeros(8, d_in), torch.zeros(d_out, 8)
        spec = linear_spec(norm(x) if normed else x, W, None, A, B, 1.0, None, 0.0, "auto", None)
        return (spec.backward, spec.packed) if spec.form == "merged" else spec.form

    assert backward(768, 768) == backward(3072, 768) == ("extended", False)
    assert backward(768, 2304, normed=True) == ("extended", True)  # a copy of dX, and not dY read once more
    assert backward(768, 768, normed=True) == ("apart", True) or backward(768, 768, normed=True)[0] == "dense"
    assert (
        backward(384, 384)[0] == backward(96, 384)[0] == "dense"
    )  # dW takes no longer than reading x and dY
    assert backward(384, 384, dtype=torch.float32)[0] == "extended"


def test_a_weight_larger_than_the_activations_is_not_formed(monkeypatch):
    monkeypatch.setattr("lora_lightning.kernels.linear_form.LARGEST", 2)
    given = arguments((2, 64), d_out=64, dtype=torch.float32)
    assert linear_spec(*spec_arguments(given)).form == "function"
    assert_same(gradients(given), gradients(given, implementation="reference"), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dora_of_a_weight_larger_than_the_activations(dtype, monkeypatch):
    monkeypatch.setattr("lora_lightning.kernels.linear_form.LARGEST", 0)
    given = arguments((2, 64), d_out=64, dtype=torch.float64, dora=True, trains=())
    exact = {name: t.clone() for name, t in given.items()}
    wide = torch.promote_types(dtype, torch.float32)
    given = {n: t.to(dtype if n in ("x", "weight", "bias") else wide) for n, t in given.items()}
    exact |= {n: given[n].double() for n in ("x", "weight", "bias")}
    for made in (given, exact):
        for name in ("A", "B", "magnitude"):
            made[name] = made[name].detach().requires_grad_()
    for one, other in zip(gradients(given), gradients(exact, implementation="reference"), strict=True):
        assert (one.double() - other).norm() < (0.012 if dtype == torch.bfloat16 else 1e-6) * other.norm()


def test_a_quantized_weight_is_not_kept_as_floats():
    x = torch.randn(32, 64, requires_grad=True)
    A, B = (torch.randn(*shape, requires_grad=True) for shape in ((4, 64), (48, 4)))
    W = nn.Parameter(QuantizedTensor.of(torch.randn(48, 64), "int8"), requires_grad=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_linear(x, W, None, A, B)
    assert not any(t.numel() >= W.numel() and not isinstance(t, QuantizedTensor) for t in kept)
    found = torch.autograd.grad(y.square().sum(), (x, A, B))
    z = F.linear(x, W.dequantize() + B @ A)
    assert_same((y, *found), (z, *torch.autograd.grad(z.square().sum(), (x, A, B))), 1e-3)


@pytest.mark.parametrize("bits", [torch.float64, torch.float32])
def test_a_layer_norm_is_made_again_by_one_call(bits):
    model = nn.Sequential(
        nn.LayerNorm(16, eps=0.3), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4), nn.Linear(4, 2)
    )
    model = model.to(bits)
    nn.init.normal_(model[0].weight)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["1", "3"]))
    for update in (u for layer in lora_layers(model).values() for u in layer.updates("default")):
        nn.init.normal_(update.lora_B)
    x = torch.randn(9, 16, dtype=bits, requires_grad=True)
    y = model[:4](x)
    source = y.grad_fn.next_functions[0][0].next_functions[0][0]
    assert "Merged" in y.grad_fn.name() and "Merged" in source.name()
    kept = copy.deepcopy(model)
    for layer in lora_layers(kept).values():
        layer.lora["default"].weight.implementation = "keep_inputs"
    ones, others = ([y := m(x), *torch.autograd.grad(y.sum(), ll.lora_parameters(m))] for m in (model, kept))
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_a_vit_trains_as_with_the_reference():
    models = []
    for implementation in ("auto", "reference"):
        torch.manual_seed(0)
        model = vit().double()
        ll.inject(model, ll.LoRAConfig(rank=2, implementation=implementation))
        optimizer = torch.optim.SGD(ll.lora_parameters(model), 0.5)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(2, 3, 16, 16).double()).square().sum().backward()
            optimizer.step()
        models.append(model.state_dict())
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d_out", [768, 2304])
def test_a_layer_norm_is_given_packed_gradients(d_out):
    """Where they come with G, their rows are further apart, which its backward on a GPU would copy."""
    norm, strides = nn.LayerNorm(768).bfloat16(), []
    x = norm(torch.randn(4096, 768).bfloat16().requires_grad_())
    x.register_hook(lambda gradient: strides.append(gradient.stride()))
    W, A, B = torch.randn(d_out, 768).bfloat16(), torch.randn(8, 768), torch.randn(d_out, 8)
    given = x, W, None, A.requires_grad_(), B.requires_grad_()
    assert linear_spec(*given, 1.0, None, 0.0, "auto", None).packed == (d_out > 2 * 768)
    lora_linear(*given).sum().backward()
    assert strides == [(768, 1)]
