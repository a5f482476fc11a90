"""Linear layers with dropout off the CPU are held to plain autograd with the same entries dropped."""

import pytest
import torch
import torch.nn.functional as F
from test_linear import arguments, assert_same, spec_arguments

from lora_lightning.kernels.functional import lora_linear
from lora_lightning.kernels.linear_form import linear_spec, plain

pytestmark = pytest.mark.usefixtures("off_cpu")
SIZES = [(5, 8, 8), (8, 5, 3), (4, 9, 2), (8, 24, 8)]  # d_in, d_out, rank


def run(given, dropout=0.4, reference=False):
    torch.manual_seed(5)
    if reference:  # the entries that torch drops
        x = given["x"]
        mask = torch.native_dropout(torch.ones_like(x.reshape(-1, x.shape[-1])), dropout, True)[1]
        dropped = x * mask.view(x.shape) / (1 - dropout)
        return plain(*given.values(), 2.0, dropped)
    return lora_linear(**given, scaling=2.0, dropout=dropout)


def gradients(y, given, **options):
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), trained, **options)]


@pytest.mark.parametrize("trains", [("x", "bias", "A", "B"), ("A", "B"), ("B",), ("x", "A")])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_reference(sizes, trains):
    d_in, d_out, rank = sizes
    given = arguments((3, 5, d_in), d_out, rank, trains=trains)
    assert linear_spec(*spec_arguments(given)[:7], 0.4, "auto", None).form == "dropped"
    assert_same(gradients(run(given), given), gradients(run(given, reference=True), given))


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_twice_differentiated(sizes):
    d_in, d_out, rank = sizes
    given = arguments((6, d_in), d_out, rank)
    seconds = []
    for reference in (False, True):
        firsts = gradients(run(given, reference=reference), given, create_graph=True)
        sum_ = sum(g.square().sum() for g in firsts[1:])
        seconds.append(torch.autograd.grad(sum_, [given[n] for n in ("x", "A", "B")]))
    assert_same(*seconds)


def test_without_gradients_and_without_an_update():
    given = arguments((6, 8), 24, 8, trains=())
    with torch.no_grad():
        assert_same([run(given)], [run(given, reference=True)])
    given["B"] = torch.zeros_like(given["B"])
    torch.testing.assert_close(run(given), F.linear(given["x"], given["weight"], given["bias"]))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    given = arguments((64, 48), 96, 8, dtype=torch.float32, trains=())
    exact = {n: None if t is None else t.double() for n, t in given.items()}
    if not autocast:
        given |= {n: given[n].bfloat16() for n in ("x", "weight", "bias")}
        exact |= {n: given[n].double() for n in ("x", "weight", "bias")}
    for made in (given, exact):
        for name in ("x", "A", "B"):
            made[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(given)
    found, wanted = gradients(y, given), gradients(run(exact, reference=True), exact)
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in found[2:])
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() / other.norm() < 0.012


def test_what_has_no_such_form():
    specs = [
        linear_spec(*spec_arguments(arguments((6, 8), 5, dora=True))[:7], 0.4, "auto", None),
        linear_spec(*spec_arguments(arguments((6, 8), 5, dtype=torch.float16))[:7], 0.4, "auto", None),
    ]
    assert [spec.form for spec in specs] == ["function"] * 2
