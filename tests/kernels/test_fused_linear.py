"""implementation="fused" end to end: with torch's operations on a CPU it is held to plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_lightning as ll
from benchmarks.measure import saved_bytes
from lora_lightning.kernels.functional import lora_conv, lora_linear
from lora_lightning.kernels.fused import linear, operators
from lora_lightning.kernels.fused.inputs import Input, input_of
from lora_lightning.kernels.fused.plain import kept
from lora_lightning.kernels.linear_form import plain
from lora_lightning.kernels.quantized_tensor import QuantizedTensor

WIDTH = 48
GIVEN = ("x", "bias", "A", "B")
MAKERS = {
    "layer_norm": nn.LayerNorm(WIDTH, eps=1e-3),
    "layer_norm-no_bias": nn.LayerNorm(WIDTH, bias=False),
    "layer_norm-plain": nn.LayerNorm(WIDTH, elementwise_affine=False),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
}
for maker in MAKERS.values():
    for parameter in maker.parameters():
        nn.init.normal_(parameter)


def arguments(shape, d_out=4, rank=2, bias=True, dtype=torch.float64, trains=GIVEN):
    d_in, wide = shape[-1], torch.promote_types(dtype, torch.float32)
    made = {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(d_out, d_in, dtype=dtype),
        "bias": torch.randn(d_out, dtype=dtype) if bias else None,
        "A": torch.randn(rank, d_in, dtype=wide),
        "B": torch.randn(d_out, rank, dtype=wide),
    }
    for name in trains:
        if made[name] is not None:
            made[name].requires_grad_()
    return made


def gradients(given, implementation, **options):
    """y, and the gradients of all that trains."""
    y = lora_linear(**given, scaling=2.0, implementation=implementation)
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    return [y, *(torch.autograd.grad((y.square() * weights).sum(), trained, **options) if trained else ())]


@pytest.fixture
def called(monkeypatch):
    """The sources that the gradients were made from."""
    found, own = [], operators.factor_gradients
    monkeypatch.setattr(operators, "factor_gradients", lambda *given: found.append(given[6]) or own(*given))
    return found


@pytest.fixture
def seeded(monkeypatch):
    """Every mask is that of one seed; returned is how to drop with it."""
    seed = torch.tensor([17])
    monkeypatch.setattr(linear, "new_seed", lambda x: seed.to(x.device))
    return lambda x, p: x * kept(x[..., 0].numel(), x.shape[-1], p, seed).view(x.shape) / (1 - p)


@pytest.mark.parametrize("name", ["identity", *MAKERS])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_equals_the_reference(name, bias, seeded, called):
    given = arguments((3, 7, WIDTH), 32, 4, bias)
    maker = copy.deepcopy(MAKERS.get(name, nn.Identity())).double()
    trained = [t for t in given.values() if t is not None and t.requires_grad]

    def fused():
        x = maker(given["x"] * 1)
        return lora_linear(**{**given, "x": x}, scaling=2.0, dropout=0.3, implementation="fused")

    x = maker(given["x"] * 1)
    reference = plain(x, *(given[n] for n in ("weight", "bias", "A", "B")), None, 2.0, seeded(x, 0.3))
    found = []
    for y in (fused(), reference):
        first = torch.autograd.grad(y.square().sum(), trained, create_graph=True)
        found.append([y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), trained)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    first = torch.autograd.grad(fused().square().sum(), trained)  # no graph of it: by the operators
    torch.testing.assert_close([*first], found[1][1 : len(trained) + 1], rtol=1e-9, atol=1e-9)
    assert set(called) == {name.partition("-")[0]}
    with torch.no_grad():
        torch.testing.assert_close(fused(), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_in_half_precision_saves_no_mask(dtype, seeded):
    given = arguments((64, WIDTH), 32, 4, dtype=dtype)
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in given.items()}
    right = plain(*(exact[n] for n in ("x", "weight", "bias", "A", "B")), None, 2.0, seeded(exact["x"], 0.3))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = lora_linear(**given, scaling=2.0, dropout=0.3, implementation="fused")
    assert [t.shape for t in saved if t is not None].count(given["x"].shape) == 1
    assert not any(t.dtype == torch.bool for t in saved)
    trained = [[t for t in of.values() if t.requires_grad] for of in (given, exact)]
    ours, theirs = (torch.autograd.grad(y.square().sum(), of) for y, of in zip((found, right), trained))
    for one, other in zip((found, *ours), (right, *theirs)):
        assert (one.double() - other).norm() <= max(4 * torch.finfo(dtype).eps, 1e-5) * other.norm()


def test_masks_follow_torchs_seed():
    given = arguments((5, 6), trains=())
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(lora_linear(**given, dropout=0.5, implementation="fused"))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    bias=st.booleans(),
    trains=st.sets(st.sampled_from(GIVEN)),
    strided=st.booleans(),
)
def test_equals_the_reference(shape, sizes, bias, trains, strided):
    d_in, d_out, rank = sizes
    given = arguments((*shape, d_in), d_out, rank, bias, trains=())
    if strided:
        given["x"] = torch.randn(*shape, 2 * d_in).double()[..., ::2]
    for name in trains:
        if given[name] is not None:
            given[name].requires_grad_()
    torch.testing.assert_close(
        gradients(given, "fused"), gradients(given, "reference"), rtol=1e-10, atol=1e-10
    )


def test_first_and_second_derivatives():
    given = arguments((3, 4), 3)

    def run(*tensors):
        return lora_linear(**{**given, **dict(zip(GIVEN, tensors))}, scaling=2.0, implementation="fused")

    torch.autograd.gradcheck(run, [given[n] for n in GIVEN])
    torch.autograd.gradgradcheck(run, [given[n] for n in GIVEN])


def block(x, maker, implementation, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(s, generator=generator).to(dtype) for s in ((32, WIDTH), (4, WIDTH), (32, 4)))
    A, B = (t.to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in (A, B))
    return lora_linear(maker(x * 1), W, None, A, B, implementation=implementation), (A, B, x)


@pytest.mark.parametrize("name", MAKERS)
def test_gradients_from_the_source_of_the_input(name, called):
    x, maker = torch.randn(3, 7, WIDTH).double().requires_grad_(), copy.deepcopy(MAKERS[name]).double()
    found = []
    for implementation in ("fused", "reference"):
        y, trained = block(x, maker, implementation)
        first = torch.autograd.grad(y.square().sum(), trained, create_graph=implementation == "reference")
        found.append([y, *first])
    assert called == [name.partition("-")[0]]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_the_input_is_not_saved(name):
    x = torch.randn(3, 70, WIDTH, requires_grad=True)
    held = torch.randn(3, 70, WIDTH, requires_grad=True)  # nothing to make it from
    extended = 4 * 32 * (WIDTH + 16)

    def run(maker, source):
        return block(source, maker, "fused", torch.float32)[0]

    def alone(maker, source):
        return maker(source * 1)

    base = saved_bytes(MAKERS[name], lambda: alone(MAKERS[name], x))
    factors = 4 * 4 * (32 + WIDTH)
    weight = 4 * 32 * WIDTH  # W, which is a frozen parameter elsewhere
    own = saved_bytes(MAKERS[name], lambda: run(MAKERS[name], x)) - base
    assert own <= extended + factors + weight < held.nbytes


def test_the_input_of_an_rms_norm():
    """Its node is a GPU's alone: what one has, and what `Input` makes of it."""
    u, weight = torch.randn(3, 7, WIDTH), torch.randn(WIDTH)
    x = F.rms_norm(u, (WIDTH,), weight, 1e-6)
    rstd = (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(Input("rms_norm", u, None, rstd, weight).whole(), x)


def test_where_the_input_itself_is_kept():
    def made():
        return MAKERS["layer_norm"](torch.randn(3, 7, WIDTH, requires_grad=True) * 1)

    x = made()
    assert input_of(x).source == "layer_norm"
    assert input_of(x.transpose(0, 1)).source == input_of(x.detach()).source == "identity"
    over_two = F.layer_norm(torch.randn(3, 7, WIDTH, requires_grad=True) * 1, (7, WIDTH))
    assert input_of(over_two).source == "identity"
    with torch.no_grad():
        x.mul_(2)
    assert input_of(x).source == "identity"
    freed = made()
    freed.sum().backward()
    assert input_of(freed).source == "identity"
    with torch.autograd.graph.save_on_cpu():
        assert input_of(made()).source == "identity"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast, called):
    if autocast and dtype == torch.float32:
        pytest.skip("no autocast to float32")
    given = arguments((64, WIDTH), 32, 4, dtype=torch.float32 if autocast else dtype)
    exact = {
        n: None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for n, t in given.items()
    }
    right = gradients(exact, "reference")
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = gradients(given, "fused")
    assert called and found[0].dtype == dtype
    unit = torch.finfo(dtype).eps
    for name, one, other in zip(("y", *GIVEN), found, right):
        assert (one.double() - other).norm() <= max(3 * unit, 1e-5) * other.norm(), name
    assert found[3].dtype == found[4].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_far_below_a_unit_is_kept_on_average(dtype):
    """What rounding W + s·B·A to nearest would lose."""
    torch.manual_seed(1)
    W, A, B = (arguments((1, 512), 512, 2, dtype=dtype, trains=())[n] for n in ("weight", "A", "B"))
    update = 2 * (B * 1e-4) @ A
    kept = operators.merge(W, A, B * 1e-4, 2.0, dtype)[:, :512].float() - W.float()
    assert ((kept * update).sum() / update.square().sum()).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_weights_keep_their_codes_alone(kind, called):
    given = arguments((9, 64), 32, 4, dtype=torch.float32)
    given["weight"] = QuantizedTensor.of(given["weight"], kind)
    torch.testing.assert_close(gradients(given, "fused"), gradients(given, "reference"), rtol=1e-3, atol=1e-3)
    assert called == ["identity"]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(**given, implementation="fused")
    assert all(type(t) is QuantizedTensor for t in saved if t.shape == (32, 64))
    assert not any(t.shape == (32, 80) for t in saved)


def test_the_meta_device_takes_the_operators():
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    on_meta = arguments((9, 64), 32, 4, dtype=torch.float32).items()
    given = {name: t.detach().to("meta").requires_grad_(t.requires_grad) for name, t in on_meta}
    with Seen():
        gradients(given, "fused")
    assert (
        seen.count("lora_lightning.merge.default")
        == seen.count("lora_lightning.factor_gradients.default")
        == 1
    )


def test_what_it_cannot_do_goes_the_way_of_auto():
    given = arguments((5, 6), trains=("A", "B"))
    named = {
        "dora-dropped": {"magnitude": torch.rand(4).double() + 0.5, "dropout": 0.5},
        "branch": {"merged": False},
    }
    assert "FusedLinear" in lora_linear(**given, implementation="fused").grad_fn.name()
    for options in named.values():
        y = lora_linear(**given, **options, implementation="fused")
        assert "LoRALinearFunction" in y.grad_fn.name()
    given["weight"].requires_grad_()
    assert "FusedLinear" not in lora_linear(**given, implementation="fused").grad_fn.name()
    x, W = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 1, 1)
    factors = torch.randn(2, 3, 1, 1), torch.randn(4, 2)
    conv = [lora_conv(x, W, None, *factors, implementation=i) for i in ("fused", "auto")]
    assert torch.equal(*conv)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act, self.fc2 = (
            nn.LayerNorm(16),
            nn.Linear(16, 32),
            nn.GELU(),
            nn.Linear(32, 16),
        )

    def forward(self, x):
        return self.fc2(self.act(self.fc1(self.norm(x))))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_trains_as_with_the_reference(checkpointed, called):
    found = []
    base = Net()
    for implementation in ("fused", "reference"):
        torch.manual_seed(3)
        model = copy.deepcopy(base)
        config = ll.LoRAConfig(
            rank=2, target_modules=["fc1", "fc2"], modules_to_save=None, implementation=implementation
        )
        ll.inject(model, config)
        optimizer = torch.optim.SGD(ll.lora_parameters(model), lr=0.1)
        x = torch.randn(4, 5, 16, requires_grad=True)  # else no graph tells of the norm
        for _ in range(3):
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            found.append([model(x), *ll.lora_parameters(model)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert len(called) == 6 and set(called) == ({"identity"} if checkpointed else {"layer_norm", "gelu"})
