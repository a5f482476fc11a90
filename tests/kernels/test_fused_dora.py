"""implementation="fused" with DoRA, with torch's operations on a CPU: held to plain autograd."""

import copy

import pytest
import torch
from test_fused_linear import GIVEN, MAKERS, WIDTH, arguments
from torch import nn

from lora_lightning.kernels.functional import lora_linear


@pytest.mark.parametrize("trains", [(*GIVEN, "magnitude"), ("A", "magnitude"), ("x", "B"), ("magnitude",)])
@pytest.mark.parametrize("d_out", [4, 2 * WIDTH + 8])
@pytest.mark.parametrize("maker", [None, *MAKERS])
def test_dora_is_the_reference(maker, d_out, trains):
    given = arguments((3, 5, WIDTH), d_out, trains=())
    given["magnitude"] = torch.rand(d_out).double() + 0.5
    for name in trains:
        given[name].requires_grad_()
    seen = given["x"]
    found = []
    for implementation in ("fused", "reference"):
        module = copy.deepcopy(MAKERS[maker]).double().requires_grad_(False) if maker else nn.Identity()
        call = {**given, "x": module(seen)}
        y = lora_linear(**call, scaling=2.0, implementation=implementation)
        trained = [t for t in given.values() if t is not None and t.requires_grad]
        found.append([y, *torch.autograd.grad(y.square().sum(), trained)])
        assert ("FusedDoRA" in y.grad_fn.name()) == (implementation == "fused")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_dora_whose_output_was_changed_in_place_and_twice_differentiated():
    given = arguments((6, WIDTH), 8)
    given["magnitude"] = (torch.rand(8).double() + 0.5).requires_grad_()
    firsts, seconds = [], []
    for implementation in ("fused", "reference"):
        y = torch.relu_(lora_linear(**given, scaling=2.0, implementation=implementation))
        names = ("A", "B", "magnitude")
        firsts.append(torch.autograd.grad(y.square().sum(), [given[n] for n in names]))
        y = lora_linear(**given, scaling=2.0, implementation=implementation)
        graph = torch.autograd.grad(y.square().sum(), [given[n] for n in names], create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in graph), [given[n] for n in names]))
    for one, other in zip((*firsts[0], *seconds[0]), (*firsts[1], *seconds[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("off_cpu")
@pytest.mark.parametrize("autocast", [False, True])
def test_dora_in_half_precision(autocast):
    given = arguments((64, WIDTH), 40, 4, dtype=torch.float32, trains=())
    given["magnitude"] = torch.rand(40) + 0.5
    exact = {n: t.double() for n, t in given.items()}
    if not autocast:
        given |= {n: given[n].bfloat16() for n in ("x", "weight", "bias")}
        exact |= {n: given[n].double() for n in ("x", "weight", "bias")}
    found = []
    for made, implementation in ((given, "fused"), (exact, "reference")):
        trained = [made[n].requires_grad_() for n in ("x", "A", "B", "magnitude")]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and implementation == "fused"):
            y = lora_linear(**made, scaling=2.0, implementation=implementation)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), trained)])
    for one, other in zip(*found, strict=True):
        assert (one.double() - other).norm() / other.norm() < 0.012
