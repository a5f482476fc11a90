"""Every architecture: "auto" adapts a sensible set, and every promise of an adapted model holds on it.

Plans of all architectures run by default, and all checks of those marked quick; the others are slow. The
promises of one model are checked on one injected and one adapted copy: the function that fails says which.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora_lightning as ll

from .probe import (
    CONFIG,
    BaseFails,
    adapted,
    as_the_base_does,
    base,
    batch,
    call,
    distance,
    give_flags,
    loss,
    redrawn,
    reference,
    run,
    same,
    tolerance,
    updates,
    without,
)
from .table import plan_of, summary
from .zoo import ZOO

SNAPSHOT = Path(__file__).with_name("snapshot.json")
EVERY = [
    pytest.param(name, marks=[] if architecture.quick else pytest.mark.slow)
    for name, architecture in ZOO.items()
    if not architecture.large
]


def dead(name: str, train: bool) -> tuple[str, ...]:
    architecture = ZOO[name]
    return tuple(architecture.dead_in_train if train else architecture.dead_in_eval)


@pytest.mark.parametrize("name", ZOO)
def test_plan(name):
    expected = json.loads(SNAPSHOT.read_text())[name]
    assert summary(plan_of(name)) == expected


@pytest.mark.parametrize("name", EVERY)
def test_an_injected_model(name):
    """Its outputs do not change, an original checkpoint loads, and training moves updates and heads alone."""
    model = base(name)
    planned = ll.inject(model, CONFIG)
    plain = give_flags(base(name), model)
    check_that_nothing_changes(name, model, plain)
    check_that_an_original_checkpoint_loads(name, model, plain)
    check_that_training_moves_updates_and_heads_alone(name, model, planned)
    with ll.adapters_off(model), torch.no_grad():
        for train in modes(name):
            assert same(run(name, model, train), run(name, plain, train))


def modes(name: str) -> tuple[bool, ...]:
    """Train mode as well where the model does something else in it: dropout is 0 and norms are frozen."""
    return (True, False) if ZOO[name].train_batch else (False,)


def check_that_nothing_changes(name: str, model: nn.Module, plain: nn.Module) -> None:
    # a weight that is read is W + s·B·A, which has a gradient as W has none
    ours, theirs = run(name, model, train=True), run(name, plain, train=True)
    assert same(ours, theirs) or distance(theirs, ours) <= 1e-6
    with torch.no_grad():
        for train in modes(name):
            assert same(run(name, model, train), run(name, plain, train))
        if "autocast" not in ZOO[name].impossible:
            half = [run(name, m, train=False, dtype=torch.bfloat16) for m in (model, plain)]
            assert same(*half)


@torch.no_grad()
def check_that_an_original_checkpoint_loads(name: str, model: nn.Module, plain: nn.Module) -> None:
    """Into a copy, with other weights than the model was built with."""
    model, other = copy.deepcopy(model), copy.deepcopy(plain)
    for parameter in other.parameters():
        parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert unexpected == [] and missing and all(".lora." in key for key in missing)
    outputs = run(name, model, train=False)
    assert same(outputs, run(name, other, train=False))
    assert not same(outputs, run(name, plain, train=False))


def check_that_training_moves_updates_and_heads_alone(name: str, model: nn.Module, planned: ll.Plan) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items() if ".lora." not in n}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()  # and nobody else puts the frozen norms into eval mode
        loss(call(model, batch(name, True))).backward()
        optimizer.step()
    after = model.state_dict()
    heads = tuple(f"{h}." for h in planned.heads)
    moved = [n for n, t in before.items() if not torch.equal(t, after[n])]
    outside = [n for n in before if planned.backbone and not n.startswith(f"{planned.backbone}.")]
    assert [n for n in moved if not n.startswith(heads) and n not in outside] == []
    assert all(any(n.startswith(h) for n in moved) for h in heads)
    assert all(
        update.lora_B.any()
        for n, update in updates(model).items()
        if not any(d in n for d in dead(name, True))
    )
    model.load_state_dict({n: before[n] for n in outside}, strict=False)


@pytest.mark.parametrize("name", EVERY)
def test_an_adapted_model(name):
    """Every update learns and acts, merged is unmerged is W + s·B·A, and copies are the same."""
    model = adapted(name)
    gradients = [learns(name, model, train) for train in (True, False)]
    check_gradient_checkpointing(name, model, gradients[0])
    model.zero_grad()
    if "merge" not in ZOO[name].impossible:
        check_that_merged_and_unmerged_are_the_sum(name, model)
    with torch.no_grad():
        expected = run(name, model, train=False)
        assert same(run(name, copy.deepcopy(model), train=False), expected)
        with contextlib.suppress(BaseFails):
            assert same(run(name, as_the_base_does(name, model, saved), train=False), expected)
    if "autocast" not in ZOO[name].impossible:
        check_that_autocast_errs_as_the_base_does(name, model)


def learns(name: str, model: nn.Module, train: bool) -> list[Tensor]:
    """The gradients, of every update but those that are known to get none. With them the output depends on
    the update; that it does as W + s·B·A says is checked beside."""
    model.zero_grad()
    loss(run(name, model, train)).backward()
    found = updates(model)
    without_gradient = [
        layer for layer, update in found.items() if not all(_arrived(p) for p in update.parameters())
    ]
    excepted = [n for n in found if any(part in n for part in dead(name, train))]
    assert [n for n in without_gradient if n not in excepted] == []
    alive = [part for part in dead(name, train) if not any(part in n for n in without_gradient)]
    assert alive == [], "named as an exception, but alive"
    return gradients_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_every_update_acts(name):
    """Of each family of layers one is switched off, which costs a forward each."""
    model = adapted(name)
    for train in (True, False):
        if train and ZOO[name].train_batch:
            continue  # the outputs are a few losses, too coarse to show one layer of many
        found, whole = updates(model), run(name, model, train)
        for layer in {re.sub(r"\d+\.", "*.", layer): layer for layer in found}.values():
            with without(found[layer]):
                still = same(run(name, model, train), whole)
            assert not still or any(part in layer for part in dead(name, train)), layer


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in ll.lora_parameters(model) if p.grad is not None]


def _arrived(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())


@torch.no_grad()
def check_that_merged_and_unmerged_are_the_sum(name: str, model: nn.Module) -> None:
    plain = reference(name, model)
    train = ZOO[name].train_batch is not None  # which boxes are kept is discrete, the losses are not
    unmerged = run(name, model, train)
    ll.merge(model)
    merged = run(name, model, train)
    ll.unmerge(model)
    assert same(run(name, model, train), unmerged)
    expected = run(name, plain, train)
    limit = tolerance(name, "merge", 1e-5)
    assert distance(expected, merged) <= limit
    assert distance(expected, unmerged) <= limit


def saved(model: nn.Module) -> nn.Module:
    """By pickle: the whole model."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def check_that_autocast_errs_as_the_base_does(name: str, model: nn.Module) -> None:
    """In bf16 the adapted model is as far from its float32 self as the merged plain model is: with updates
    drawn three times, since the largest error of a few outputs is a matter of chance."""
    own = error = 0.0
    for seed in range(3, 6):
        plain = reference(name, redrawn(model, seed))
        exact = run(name, plain, train=False)
        error += distance(exact, run(name, plain, train=False, dtype=torch.bfloat16)) / 3
        own += distance(exact, run(name, model, train=False, dtype=torch.bfloat16)) / 3
    assert own <= tolerance(name, "autocast", 2.0) * error + 1e-3


def check_gradient_checkpointing(name: str, model: nn.Module, gradients: list[Tensor]) -> None:
    model = copy.deepcopy(model)
    if enable_checkpointing(model):
        model.zero_grad()
        loss(run(name, model, train=True)).backward()
        assert distance(gradients, gradients_of(model)) <= 1e-6


def enable_checkpointing(model: nn.Module) -> bool:
    """Whether the model offers it."""
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
