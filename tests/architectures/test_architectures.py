"""Every architecture: "auto" adapts a sensible set, and every promise of an adapted model holds on it.

Plans of all architectures run by default, and all checks of those marked quick; the others are slow.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import nn

import lora_lightning as ll

from .probe import (
    CONFIG,
    adapted,
    base,
    batch,
    call,
    distance,
    doubled,
    loss,
    reference,
    run,
    same,
    updates,
    without,
)
from .table import plan_of, summary
from .zoo import ZOO

T = TypeVar("T")
SNAPSHOT = Path(__file__).with_name("snapshot.json")
EVERY = [
    pytest.param(name, marks=[] if architecture.quick else pytest.mark.slow)
    for name, architecture in ZOO.items()
    if not architecture.large
]
ALL_SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name, architecture in ZOO.items() if not architecture.large
]


def skip_if_impossible(name: str, check: str) -> None:
    if reason := ZOO[name].impossible.get(check):
        pytest.skip(f"the base model itself: {reason}")


def tolerance(name: str, check: str, default: float) -> float:
    return ZOO[name].tolerances.get(check, (default, ""))[0]


def dead(name: str, train: bool) -> tuple[str, ...]:
    architecture = ZOO[name]
    return tuple(architecture.dead_in_train if train else architecture.dead_in_eval)


def give_flags(model: nn.Module, like: nn.Module) -> nn.Module:
    """A weight's `requires_grad` alone can make torch choose another kernel, with and without gradients."""
    flags = {n: p.requires_grad for n, p in like.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    return model


@pytest.mark.parametrize("name", ZOO)
def test_plan(name):
    expected = json.loads(SNAPSHOT.read_text())[name]
    assert summary(plan_of(name)) == expected


@pytest.mark.parametrize("name", EVERY)
def test_nothing_changes_at_injection(name):
    model = base(name)
    ll.inject(model, CONFIG)
    plain = give_flags(base(name), model)
    for train in (True, False):  # a weight that is read is W + s·B·A, which has a gradient as W has none
        ours, theirs = run(name, model, train), run(name, plain, train)
        assert same(ours, theirs) or distance(theirs, ours) <= 1e-6
    with torch.no_grad():
        for train in (True, False):
            assert same(run(name, model, train), run(name, plain, train))
        if "autocast" not in ZOO[name].impossible:
            half = [run(name, m, train=False, dtype=torch.bfloat16) for m in (model, plain)]
            assert same(*half)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_every_update_learns_and_acts(name, train):
    """Gradients of all; the effect on the output, which costs a forward each, of one of each family."""
    model = adapted(name)
    loss(run(name, model, train)).backward()
    found = updates(model)
    without_gradient = [
        layer for layer, update in found.items() if not all(_arrived(p) for p in update.parameters())
    ]
    without_effect = []
    one_of_each = {re.sub(r"\d+\.", "*.", layer): layer for layer in found}.values()
    if train and ZOO[name].train_batch:
        one_of_each = []  # the outputs are a few losses, too coarse to show one layer of many
    with torch.no_grad():
        whole = run(name, model, train)
        for layer in one_of_each:
            with without(found[layer]):
                if same(run(name, model, train), whole):
                    without_effect.append(layer)
    excepted = [n for n in found if any(part in n for part in dead(name, train))]
    assert (
        [n for n in without_gradient if n not in excepted],
        [n for n in without_effect if n not in excepted],
    ) == ([], [])
    named = [
        part for part in dead(name, train) if not any(part in n for n in [*without_gradient, *without_effect])
    ]
    assert named == [], "named as an exception, but alive"


def _arrived(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.parametrize("name", EVERY)
def test_training_moves_updates_and_heads_alone(name):
    model = base(name)
    before = copy.deepcopy(model.state_dict())
    planned = ll.inject(model, CONFIG)
    plain = give_flags(base(name), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()  # and nobody else puts the frozen norms into eval mode
        loss(call(model, batch(name, True))).backward()
        optimizer.step()
    after = model.state_dict()
    heads = tuple(f"{h}." for h in planned.heads)
    moved = [n for n, t in before.items() if not torch.equal(t, after[n])]
    outside = [n for n in before if planned.backbone and not n.startswith(f"{planned.scope}.")]
    assert [n for n in moved if not n.startswith(heads) and n not in outside] == []
    assert all(any(n.startswith(h) for n in moved) for h in heads)
    assert all(
        update.lora_B.any()
        for n, update in updates(model).items()
        if not any(d in n for d in dead(name, True))
    )
    model.load_state_dict({n: before[n] for n in outside}, strict=False)
    with ll.adapters_off(model), torch.no_grad():
        for train in (True, False):
            assert same(run(name, model, train), run(name, plain, train))


@pytest.mark.parametrize("name", EVERY)
def test_merged_and_unmerged_are_the_sum(name):
    skip_if_impossible(name, "merge")
    model = adapted(name)
    plain = reference(name, model)
    train = ZOO[name].train_batch is not None  # which boxes are kept is discrete, the losses are not
    with torch.no_grad():
        unmerged = run(name, model, train)
        ll.merge(model)
        merged = run(name, model, train)
        ll.unmerge(model)
        assert same(run(name, model, train), unmerged)
        expected = run(name, plain, train)
    limit = tolerance(name, "merge", 1e-5)
    assert distance(expected, merged) <= limit
    assert distance(expected, unmerged) <= limit


@pytest.mark.parametrize("name", EVERY)
def test_an_original_checkpoint_loads(name):
    other = base(name, seed=5)
    model = base(name)
    ll.inject(model, CONFIG)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == [] and missing and all(".lora." in key for key in missing)
    give_flags(other, model)
    with torch.no_grad():
        assert same(run(name, model, train=False), run(name, other, train=False))


@pytest.mark.parametrize("name", EVERY)
def test_copies_and_pickles_are_the_same(name):
    model = adapted(name)
    with torch.no_grad():
        expected = run(name, model, train=False)
        assert same(run(name, copy.deepcopy(model), train=False), expected)
        for again in (pickled, saved):
            assert same(run(name, as_the_base_does(name, model, again), train=False), expected)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def as_the_base_does(name: str, model: nn.Module, attempt: Callable[[nn.Module], T]) -> T:
    """What can be done with the adapted model, unless it cannot be done with the base model either."""
    try:
        return attempt(model)
    except Exception as failure:
        try:
            attempt(base(name))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            pytest.skip(f"the base model itself: {type(error).__name__}: {lines[0][:120]}")
        raise failure


@pytest.mark.parametrize("name", EVERY)
def test_autocast_errs_as_the_base_does(name):
    """In bf16 the adapted model is as far from its float32 self as the merged plain model is: with updates
    drawn three times, since the largest error of a few outputs is a matter of chance."""
    skip_if_impossible(name, "autocast")
    own = error = 0.0
    for seed in range(3, 6):
        model = adapted(name, seed=seed)
        plain = reference(name, model)
        with torch.no_grad():
            exact = run(name, plain, train=False)
            error += distance(exact, run(name, plain, train=False, dtype=torch.bfloat16)) / 3
            own += distance(exact, run(name, model, train=False, dtype=torch.bfloat16)) / 3
    assert own <= tolerance(name, "autocast", 2.0) * error + 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = adapted(name)
    gradients = []
    for switch in (False, True):
        if switch and not enable_checkpointing(model):
            pytest.skip("the model offers none")
        model.zero_grad()
        loss(run(name, model, train=True)).backward()
        gradients.append([p.grad.clone() for p in ll.lora_parameters(model) if p.grad is not None])
    assert distance(*gradients) <= 1e-6


def enable_checkpointing(model: nn.Module) -> bool:
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return True
    if hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
        except AssertionError:
            return False
        return True
    return False


@pytest.mark.parametrize("name", ALL_SLOW)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compiles_where_the_base_does(name, train):
    """In one graph where the base model is one, else with breaks."""
    model = adapted(name)
    if apart(name, model, train) > tolerance(name, "compile", 1e-4 if train else 1e-5):
        # Rounding, where some gradients are a millionth of the others, or where the best of many values that
        # are nearly equal are taken? Then not in float64.
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
    except pytest.skip.Exception:
        return as_the_base_does(name, model, partial(of, in_one_graph=False))


def gradients_of(model: nn.Module, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss(outputs).backward()
    return [p.grad.clone() for p in ll.lora_parameters(model) if p.grad is not None]


@pytest.mark.parametrize("name", ALL_SLOW)
def test_exports_where_the_base_does(name):
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
