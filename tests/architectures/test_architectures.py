"""Every architecture: "auto" adapts a sensible set, and every promise of an adapted model holds on it.

Plans of all architectures run by default, and all checks of those marked quick; the others are slow.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lightning as ll

from .probe import (
    CONFIG,
    adapted,
    base,
    batch,
    distance,
    loss,
    reference,
    run,
    same,
    set_mode,
    tensors,
    updates,
    without,
)
from .table import plan_of, summary
from .zoo import ZOO

SNAPSHOT = Path(__file__).with_name("snapshot.json")
EVERY = [
    pytest.param(name, marks=[] if architecture.quick else pytest.mark.slow)
    for name, architecture in ZOO.items()
]
ALL_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ZOO]


def skip_if_impossible(name: str, check: str) -> None:
    if reason := ZOO[name].impossible.get(check):
        pytest.skip(f"the base model itself: {reason}")


def tolerance(name: str, check: str, default: float) -> float:
    return ZOO[name].tolerances.get(check, (default, ""))[0]


def dead(name: str, train: bool) -> tuple[str, ...]:
    architecture = ZOO[name]
    return tuple(architecture.dead_in_train if train else architecture.dead_in_eval)


def give_flags(model: nn.Module, like: nn.Module) -> nn.Module:
    """Freezing alone can make torch choose another kernel."""
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
    assert same(run(name, model, train=True), run(name, plain, train=True))
    with torch.no_grad():
        assert same(run(name, model, train=False), run(name, plain, train=False))
        if "autocast" not in ZOO[name].impossible:
            half = [run(name, m, train=False, dtype=torch.bfloat16) for m in (model, plain)]
            assert same(*half)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_every_update_learns_and_acts(name, train):
    model = adapted(name)
    loss(run(name, model, train)).backward()
    found = updates(model)
    without_gradient, without_effect = [], []
    with torch.no_grad():
        whole = run(name, model, train)
        for layer, update in found.items():
            gradients = [p.grad for p in (update.lora_A, update.lora_B)]
            if not all(g is not None and g.isfinite().all() and g.any() for g in gradients):
                without_gradient.append(layer)
            with without(update):
                if same(run(name, model, train), whole):
                    without_effect.append(layer)
    excepted = [n for n in found if any(part in n for part in dead(name, train))]
    assert [n for n in without_gradient if n not in excepted] == []
    assert [n for n in without_effect if n not in excepted] == []
    named = [part for part in dead(name, train) if not any(part in n for n in without_gradient)]
    assert named == [], "named as an exception, but alive"


@pytest.mark.parametrize("name", EVERY)
def test_training_moves_updates_and_heads_alone(name):
    model = base(name)
    before = copy.deepcopy(model.state_dict())
    planned = ll.inject(model, CONFIG)
    plain = give_flags(base(name), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        set_mode(model, True)
        model.train()  # frozen norms must stay in eval by themselves
        inputs = batch(name, True)
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        loss([t for t in tensors(output) if t.is_floating_point()]).backward()
        optimizer.step()
    after = model.state_dict()
    heads = tuple(f"{h}." for h in planned.heads)
    moved = [n for n, t in before.items() if not torch.equal(t, after[n])]
    assert [n for n in moved if not n.startswith(heads)] == []
    assert all(any(n.startswith(h) for n in moved) for h in heads)
    assert all(
        update.lora_B.any()
        for n, update in updates(model).items()
        if not any(d in n for d in dead(name, True))
    )
    with ll.adapters_off(model), torch.no_grad():
        for train in (True, False):
            assert same(run(name, model, train), run(name, plain, train))


@pytest.mark.parametrize("name", EVERY)
def test_merged_and_unmerged_are_the_sum(name):
    model = adapted(name)
    plain = reference(name, model)
    with torch.no_grad():
        unmerged = run(name, model, train=False)
        ll.merge(model)
        merged = run(name, model, train=False)
        ll.unmerge(model)
        assert same(run(name, model, train=False), unmerged)
        expected = run(name, plain, train=False)
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
    copies = [copy.deepcopy(model)]
    if "pickle" not in ZOO[name].impossible:
        copies.append(pickle.loads(pickle.dumps(model)))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies.append(torch.load(file, weights_only=False))
    with torch.no_grad():
        expected = run(name, model, train=False)
        for other in copies:
            assert same(run(name, other, train=False), expected)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_errs_as_the_base_does(name):
    """In bf16 the adapted model is as far from its float32 self as the merged plain model is."""
    skip_if_impossible(name, "autocast")
    model = adapted(name)
    plain = reference(name, model)
    with torch.no_grad():
        exact = run(name, plain, train=False)
        error = distance(exact, run(name, plain, train=False, dtype=torch.bfloat16))
        own = distance(exact, run(name, model, train=False, dtype=torch.bfloat16))
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
    skip_if_impossible(name, "compile")
    fullgraph = "fullgraph" not in ZOO[name].impossible
    torch.compiler.reset()
    model = adapted(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    with torch.set_grad_enabled(train):
        expected, got = run(name, model, train), run(name, compiled, train)
    assert distance(expected, got) <= tolerance(name, "compile", 1e-5)
    if train:
        wanted, found = (gradients_of(model, out) for out in (expected, got))
        assert distance(wanted, found) <= tolerance(name, "compile", 1e-4)


def gradients_of(model: nn.Module, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    loss(outputs).backward()
    return [p.grad.clone() for p in ll.lora_parameters(model) if p.grad is not None]


@pytest.mark.parametrize("name", ALL_SLOW)
def test_exports_where_the_base_does(name):
    skip_if_impossible(name, "export")
    model = adapted(name).eval()
    inputs = batch(name, train=False)
    arguments, keywords = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        expected = run(name, model, train=False)
        exported = torch.export.export(model, arguments, keywords, strict=False)
        got = [t for t in tensors(exported.module()(*arguments, **keywords)) if t.is_floating_point()]
    assert distance(expected, got) <= tolerance(name, "export", 1e-5)
