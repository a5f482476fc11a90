"""lora_linear: the fast function is held to plain autograd in every setting, twice differentiated too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_lightning as ll
from lora_lightning.kernels import common as kernels
from lora_lightning.kernels.dropout import keep_mask
from lora_lightning.kernels.functional import lora_linear
from lora_lightning.kernels.linear import forward
from lora_lightning.kernels.linear_form import linear_spec, plain
from lora_lightning.layers.registry import lora_layers

NAMES = ("x", "weight", "bias", "A", "B", "magnitude")
GIVEN = ("x", "bias", "A", "B", "magnitude")


def arguments(shape=(3, 5, 6), d_out=4, rank=2, bias=True, dora=False, dtype=torch.float64, trains=GIVEN):
    d_in = shape[-1]
    made = {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(d_out, d_in, dtype=dtype),
        "bias": torch.randn(d_out, dtype=dtype) if bias else None,
        "A": torch.randn(rank, d_in, dtype=dtype),
        "B": torch.randn(d_out, rank, dtype=dtype),
        "magnitude": torch.rand(d_out, dtype=dtype) + 0.5 if dora else None,
    }
    for name in trains:
        if made[name] is not None:
            made[name].requires_grad_()
    return made


def spec_arguments(given):
    """Those of `linear_spec`, with nothing asked for."""
    return *(given[n] for n in NAMES[:-1]), 2.0, given["magnitude"], 0.0, "auto", None


def call(given, implementation="auto", dropout=0.0, **options):
    torch.manual_seed(3)
    if implementation == "reference" and dropout:  # with the fast function's own random numbers
        mask = keep_mask(given["x"], dropout)
        return plain(*(given[n] for n in NAMES), 2.0, given["x"] * mask / (1 - dropout))
    return lora_linear(**given, scaling=2.0, implementation=implementation, dropout=dropout, **options)


def gradients(given, create_graph=False, **options):
    """y, and the gradients of all that trains."""
    y = call(given, **options)
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    if not trained:
        return [y]
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y.square() * weights).sum(), trained, create_graph=create_graph)]


def assert_same(ones, others, tolerance=1e-10):
    for one, other in zip(ones, others, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    flags=st.tuples(st.booleans(), st.booleans()),
    trains=st.sets(st.sampled_from(GIVEN)),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]),
    dropout=st.sampled_from([0.0, 0.5]),
    merged=st.sampled_from([None, True, False]),
)
def test_equals_the_reference(shape, sizes, flags, trains, layout, dropout, merged):
    d_in, d_out, rank = sizes
    given = arguments((*shape, d_in), d_out, rank, *flags, trains=())
    x = given["x"]
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        x = torch.randn(*shape, 2 * d_in).double()[..., ::2]
    elif layout == "expanded" and shape:
        x = torch.randn(1, *shape[1:], d_in).double().expand(*shape, d_in)
    given["x"] = x.detach()
    for name in trains:
        if given[name] is not None:
            given[name].requires_grad_()
    assert_same(
        gradients(given, dropout=dropout, merged=merged),
        gradients(given, dropout=dropout, implementation="reference"),
    )


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 64, 65, 700])
@pytest.mark.parametrize("rank", [4, 16])
def test_rows_in_several_pieces(rank, rows, threads, dropout, merged, monkeypatch):
    monkeypatch.setattr(kernels, "CACHED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    given = arguments((rows, 6), rank=rank, dora=True)
    fast, reference = (
        gradients(given, merged=merged, dropout=dropout, implementation=k) for k in ("auto", "reference")
    )
    assert_same(fast, reference, 1e-9)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(merged, bias):
    given = arguments((3, 4), 3, bias=bias)
    names = [n for n, t in given.items() if t is not None and t.requires_grad]

    def run(*tensors):
        return call({**given, **dict(zip(names, tensors, strict=True))}, merged=merged)

    torch.autograd.gradcheck(run, [given[n] for n in names])
    torch.autograd.gradgradcheck(run, [given[n] for n in names])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives_equal_the_references(dora, dropout):
    given = arguments(dora=dora)
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    found = []
    for name in ("auto", "reference"):
        first = gradients(given, create_graph=True, dropout=dropout, implementation=name)[1:]
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    assert_same(*found)


@pytest.mark.parametrize("bias", [False, True])
def test_the_magnitude_of_a_row_of_zeros_has_the_gradient_zero(bias):
    given = arguments(bias=bias, dora=True)
    with torch.no_grad():
        for name in ("weight", "B", "magnitude"):
            given[name][1] = 0
    fast, reference = (gradients(given, implementation=k) for k in ("auto", "reference"))
    assert_same(fast, reference)
    assert fast[-1][1] == 0 and fast[-1].count_nonzero() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_no_update_gives_the_base_layers_very_bits(dtype, merged, grad, dora):
    given = arguments((7, 9, 48), 32, rank=4, dora=dora, dtype=dtype)
    with torch.no_grad():
        given["B"].zero_()
        if dora:
            given["magnitude"].copy_(given["weight"].norm(dim=1))
    base = F.linear(given["x"].detach(), given["weight"], given["bias"].detach())
    with torch.set_grad_enabled(grad):
        if dora and dtype != torch.float32:
            pytest.skip("DoRA in half precision takes the reference")
        assert torch.equal(call(given, merged=merged), base)


@pytest.mark.parametrize("shape", [(1536,), (1, 4096), (8, 197, 384), (2, 7, 7, 96)], ids=str)
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_branch_of_zeros_leaves_the_bits_in_every_layout(shape, layout, bias, dropout):
    given = arguments(shape, 130, bias=bias, dtype=torch.float32, trains=())
    given["B"].zero_()
    if layout == "transposed" and len(shape) > 2:
        given["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        given["x"] = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    base = F.linear(given["x"], given["weight"], given["bias"])
    assert torch.equal(call(given, merged=False, dropout=dropout), base)


@pytest.mark.parametrize(
    ("tokens", "dtype", "merged"),
    [(197, torch.float32, False), (1576, torch.float32, True), (1576, torch.bfloat16, False)],
)
def test_the_rule_of_merging(tokens, dtype, merged):
    given = arguments((tokens, 384), 1536, 8, bias=False, dtype=dtype, trains=())  # one image, and eight
    assert linear_spec(*spec_arguments(given)).merged == merged


def test_no_gradient_of_the_weights_shape_and_none_for_a_weight_that_trains(monkeypatch):
    given = arguments((40, 6), 4)
    products = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **o: products.append((a.shape, b.shape)) or real(a, b, **o))
    gradients(given, merged=True)
    assert all(2 in (a[0], b[1]) for a, b in products) and products
    given["weight"].requires_grad_()  # the reference, which gives W its gradient
    assert_same(gradients(given), gradients(given, implementation="reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(dtype):
    given = arguments((5, 9, 32), 24, rank=4, dtype=torch.float32)
    exact = gradients(given)
    with torch.autocast("cpu", dtype):
        y = call(given)
        reference = call(given, implementation="reference")
    assert y.dtype == reference.dtype == dtype
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    weights = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
    found = torch.autograd.grad((y.float().square() * weights).sum(), trained)
    for one, other in zip(found, exact[1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.03 * other.norm()


def test_backward_twice_through_a_kept_graph_and_a_changed_parameter():
    given = arguments(dora=True)
    y = call(given)
    first = torch.autograd.grad(y.sum(), given["A"], retain_graph=True)[0]
    trained = [given["A"], given["magnitude"]]
    again, magnitude = torch.autograd.grad(y.sum(), trained, retain_graph=True)
    assert torch.equal(first, again)
    assert_same([magnitude], torch.autograd.grad(call(given, implementation="reference").sum(), trained[1:]))
    with torch.no_grad():
        given["B"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("change", [torch.Tensor.relu_, lambda y: y.mul_(2)], ids=["relu", "double"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dora", [False, True])
def test_the_output_may_be_changed_in_place(change, dropout, dora):
    given = arguments(dora=dora)
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    found = [
        torch.autograd.grad(change(call(given, dropout=dropout, implementation=name)).sum(), trained)
        for name in ("auto", "reference")
    ]
    assert_same(*found)


def test_function_transforms_and_forward_mode_take_the_reference():
    given = arguments(trains=())
    x = given.pop("x")
    run = lambda x: lora_linear(x, **given)  # noqa: E731
    assert_same([torch.func.vmap(run)(x)], [run(x)])
    assert_same([torch.func.jvp(run, (x,), (x,))[1]], [run(x) - given["bias"]])
    assert_same([torch.func.grad(lambda x: run(x).sum())(x)[0]], [torch.func.jacrev(run)(x[0]).sum((0, 1))])


def fused(*targets, **options):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(6, 12)

        def forward(self, x):
            return self.qkv(x)

    model = Attention().double()
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=list(targets), modules_to_save=None, **options))
    return model


def values_and_gradients(model, x):
    torch.manual_seed(5)
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("targets", [["qkv"], ["qkv.q", "qkv.v"]], ids=str)
def test_layers_of_both_kernels_agree(targets, options):
    model = fused(*targets, **options)
    for parameter in ll.lora_parameters(model):
        parameter.data.normal_()
    reference = copy.deepcopy(model)
    for layer in lora_layers(reference).values():
        for update in layer.updates("default"):
            update.implementation = "reference"
    x = torch.randn(3, 5, 6).double()
    assert_same(values_and_gradients(model, x), values_and_gradients(reference, x))


def test_two_selected_adapters_are_one_update(monkeypatch):
    model = fused("qkv")
    ll.add_adapter(model, "other", ll.LoRAConfig(rank=3, target_modules=["qkv.v"], modules_to_save=None))
    ll.set_adapter(model, "default", "other")
    for parameter in ll.lora_parameters(model):
        parameter.data.normal_()
    x = torch.randn(3, 5, 6).double()
    assert_same([model(x)], [F.linear(x, model.qkv.weight, model.qkv.bias)])
    assert "LoRALinearFunction" in model(x).grad_fn.name()


def test_the_kernel_is_an_option():
    assert "LoRALinearFunction" in fused("qkv")(torch.randn(2, 6).double()).grad_fn.name()
    assert (
        "LoRALinear"
        not in fused("qkv", implementation="reference")(torch.randn(2, 6).double()).grad_fn.name()
    )
    with pytest.raises(
        ll.ConfigError, match="implementation='fast': give one of auto, keep_inputs, reference, fused"
    ):
        ll.LoRAConfig(implementation="fast")


def test_dropout_masks_are_saved_as_bytes_and_follow_train_and_eval():
    model = fused("qkv", dropout=0.5)
    for parameter in ll.lora_parameters(model):
        parameter.data.normal_()
    x = torch.randn(7, 5, 6).double()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert not torch.equal(model(x), model(x))
    assert {t.dtype for t in saved if t.shape == x.shape and t is not x} == {torch.bool}
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_mask_keeps_as_many_as_it_says_in_every_place(dropout):
    x = torch.empty(2000, 999)  # no multiple of a run's length
    mask, keep = keep_mask(x, dropout), 1 - dropout
    assert mask.shape == x.shape and mask.dtype == torch.bool and mask.is_contiguous()
    deviation = (keep * dropout) ** 0.5
    # closer than to the next multiple of 1/256
    assert mask.float().mean().item() == pytest.approx(keep, abs=5 * deviation / mask.numel() ** 0.5)
    for place in range(8):  # of the eight that share their random bits
        part = mask.flatten()[place::8].float()
        assert part.mean().item() == pytest.approx(keep, abs=5 * deviation / part.numel() ** 0.5)
    pairs = (mask[:, 1:] == mask[:, :-1]).float().mean().item()  # neighbours do not know each other
    assert pairs == pytest.approx(keep**2 + (1 - keep) ** 2, abs=0.005)


@pytest.mark.parametrize(
    ("rank", "bias", "tokens", "merged"),
    [
        # 8 -> 24: y begins with the branch, which touches x alone, up to rank 16 and where there is a bias
        (2, True, 48, False),
        (2, True, 49, True),
        (16, True, 48, False),
        (17, True, 13, True),
        (2, False, 12, False),
        (2, False, 13, True),
    ],
)
def test_when_the_sum_of_weight_and_update_is_formed(rank, bias, tokens, merged):
    given = arguments((tokens, 8), 24, rank, bias, dtype=torch.float32)
    spec = linear_spec(*spec_arguments(given))
    assert spec.merged == merged
    assert (forward(*(given[n] for n in NAMES), None, spec)[2] is None) == merged  # H
