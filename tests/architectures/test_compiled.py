"""Every architecture compiles and exports where its base model does: slow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

import lora_lightning as ll

from .probe import BaseFails, adapted, as_the_base_does, batch, call, distance, doubled, loss, run, tolerance
from .zoo import ZOO

pytestmark = pytest.mark.slow
EVERY = [name for name, architecture in ZOO.items() if not architecture.large]


@contextlib.contextmanager
def where_the_base_does() -> Iterator[None]:
    try:
        yield
    except BaseFails as error:
        pytest.skip(f"the base model itself: {error}")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiles_where_the_base_does(name, train):
    """In one graph where the base model is one, else with breaks."""
    model = adapted(name)
    with where_the_base_does():
        if apart(name, model, train) > tolerance(name, "compile", 1e-4 if train else 1e-5):
            # Rounding, where some gradients are a millionth of the others, or where the best of many values
            # that are nearly equal are taken? Then not in float64.
            assert apart(name, adapted(name).double(), train, double=True) <= 1e-7


def apart(name: str, model: nn.Module, train: bool, double: bool = False) -> float:
    """The distance of the compiled model's outputs, and of the gradients of its updates; infinite where a
    detector keeps another number of boxes."""
    with torch.set_grad_enabled(train):
        expected, got = (f(name, model, train, double=double) for f in (run, compiled))
    if [t.shape for t in expected] != [t.shape for t in got]:
        return math.inf
    errors = [distance(expected, got)]
    if train:
        gradients = [gradients_of(model, outputs) for outputs in (expected, got)]
        errors.append(distance(*gradients))
    return max(errors)


def compiled(name: str, model: nn.Module, train: bool, double: bool = False) -> list[torch.Tensor]:
    def of(model: nn.Module, in_one_graph: bool) -> list[torch.Tensor]:
        torch.compiler.reset()
        found = torch.compile(model, backend="eager", fullgraph=in_one_graph)
        return run(name, found, train, double=double)

    try:
        return as_the_base_does(name, model, partial(of, in_one_graph=True))
    except BaseFails:
        return as_the_base_does(name, model, partial(of, in_one_graph=False))


def gradients_of(model: nn.Module, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss(outputs).backward()
    return [p.grad.clone() for p in ll.lora_parameters(model) if p.grad is not None]


@pytest.mark.parametrize("name", EVERY)
def test_exports_where_the_base_does(name):
    with where_the_base_does():
        if exported_apart(name) > tolerance(name, "export", 1e-5):
            assert exported_apart(name, double=True) <= 1e-7  # as above


def exported_apart(name: str, double: bool = False) -> float:
    model, inputs = adapted(name).eval(), batch(name, train=False)
    if double:
        model, inputs = model.double(), doubled(inputs)
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, {})

    def export(model: nn.Module) -> list[torch.Tensor]:
        return call(torch.export.export(model.eval(), arguments, keywords).module(), inputs)

    with torch.no_grad():
        return distance(call(model, inputs), as_the_base_does(name, model, export))
