"""ScaledAdamW against the paper's equation in numpy, PEFT's own, and plain AdamW."""

import copy

import numpy as np
import peft
import pytest
import torch
from families import CASES, TYPICAL, adapted, floats, loss
from peft.optimizers import create_riemannian_optimizer
from small import mlp, pretrained
from torch import nn

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.layers.registry import lora_layers
from lora_lightning.methods.pairs import pairs_of
from lora_lightning.methods.scaled_adamw import preconditioned


def in_papers_form(update, A, B):
    """A and B of each group as matrices whose product is B·A: (r, k) and (m, r)."""
    groups = zip(np.split(A, update.slot.groups), np.split(B, update.slot.groups), strict=True)
    for a, b in groups:
        a, b = a.reshape(update.rank, -1), b.reshape(len(b), -1)
        yield (b, a.T) if update.slot.transposed else (a, b)


@pytest.mark.parametrize("name", sorted(TYPICAL))
def test_each_factor_has_the_papers_gradient(name):
    """(BᵀB + δI)⁻¹∇A and ∇B(AAᵀ + δI)⁻¹, for each group by itself."""
    model = adapted(name, torch.float64)
    torch.manual_seed(3)
    loss(list(floats(model(*CASES[name].inputs(torch.float64))))).backward()
    found = preconditioned(pairs_of(model), 1e-3)
    updates = [u for layer in lora_layers(model).values() for u in layer.updates("default")]
    assert len(found) == 2 * len(updates) > 0
    for update in updates:
        both = (update.lora_A, update.lora_B)
        factors, gradients, ours = (
            in_papers_form(update, *(t.detach().numpy() for t in tensors))
            for tensors in (both, [p.grad for p in both], [found[p] for p in both])
        )
        for (A, B), (gradient_A, gradient_B), (ours_A, ours_B) in zip(factors, gradients, ours, strict=True):
            eye = 1e-3 * np.eye(len(A))
            np.testing.assert_allclose(
                ours_A, np.linalg.inv(B.T @ B + eye) @ gradient_A, rtol=1e-8, atol=1e-12
            )
            np.testing.assert_allclose(
                ours_B, gradient_B @ np.linalg.inv(A @ A.T + eye), rtol=1e-8, atol=1e-12
            )


def test_the_step_of_the_product_does_not_depend_on_how_it_is_shared_out():
    """With (T·A, B·T⁻¹) for (A, B) the direction B·∇A + ∇B·A is the same, other than plain gradients'."""
    A, B, target = torch.randn(3, 8).double(), torch.randn(6, 3).double(), torch.randn(6, 8).double()
    T = torch.randn(3, 3).double()

    def directions(A, B):
        model = nn.Sequential(nn.Linear(8, 6).double())
        ll.inject(model, ll.LoRAConfig(rank=3, target_modules="all", modules_to_save=None))
        (pair,) = pairs_of(model)
        pair.A.data, pair.B.data = A.clone(), B.clone()
        (model[0].weight * target).sum().backward()
        scaled = preconditioned([pair], 1e-14)
        return [
            B @ of[0] + of[1] @ A for of in ((scaled[pair.A], scaled[pair.B]), (pair.A.grad, pair.B.grad))
        ]

    (ours, plain), (ours_shared, plain_shared) = directions(A, B), directions(T @ A, B @ T.inverse())
    torch.testing.assert_close(ours, ours_shared, rtol=1e-7, atol=1e-9)
    assert (plain - plain_shared).abs().max() > 1


def fit(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(7, 6, generator=generator, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_it_is_pefts():
    """Their function on their model; the head beside it is AdamW's in both."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0", "3"], modules_to_save=["5"])
    theirs = peft.get_peft_model(pretrained(mlp).double(), config)
    with torch.no_grad():
        for pair in pairs_of(theirs):
            pair.B.normal_()
    ours = copy.deepcopy(theirs)
    fit(theirs, create_riemannian_optimizer(theirs, torch.optim.AdamW, lr=1e-2, reg=1e-3, weight_decay=0))
    fit(ours, ll.ScaledAdamW(ll.param_groups(ours, lr=1e-2), ours, damping=1e-3))
    for (name, p), (_, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def model_of(**options):
    model = pretrained(mlp)
    torch.manual_seed(0)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0", "3"], modules_to_save=["5"], **options))
    with torch.no_grad():
        for pair in pairs_of(model):
            pair.B.normal_(std=0.1)
    return model


def optimizer_of(model, kind=ll.ScaledAdamW, **options):
    own = {"module": model} if kind is ll.ScaledAdamW else {}
    return kind(ll.param_groups(model, lr=1e-2), **own, **options)


def test_what_is_no_factor_is_adamws():
    one, other = model_of(use_dora=True), model_of(use_dora=True)
    for model, kind in ((one, ll.ScaledAdamW), (other, torch.optim.AdamW)):
        fit(model, optimizer_of(model, kind, weight_decay=0), steps=1)
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q) == ("lora_A" not in name and "lora_B" not in name), name


def test_gradients_stay_hooks_and_closures_run_once():
    model = model_of()
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # now AdamW's own step has hooks too
    optimizer, calls = optimizer_of(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        value = model(torch.ones(2, 6)).square().sum()
        value.backward()
        kept.update({p: p.grad.clone() for p in model.parameters() if p.grad is not None})
        return value

    kept = {}
    assert optimizer.step(closure) > 0
    assert calls == ["before", "closure", "after"]
    assert kept and all(torch.equal(p.grad, gradient) for p, gradient in kept.items())


def test_an_update_without_a_gradient_stays():
    model = model_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model)
    model[3](torch.ones(2, 16)).sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"3.lora.default.weight.lora_A", "3.lora.default.weight.lora_B"}


def test_a_gradient_scaler_changes_nothing_and_skips_what_is_not_finite():
    one, other = model_of(), model_of()
    x = torch.ones(2, 6)
    plain, scaled = optimizer_of(one), optimizer_of(other)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        one(x).square().sum().backward()
        plain.step()
        scaler.scale(other(x).square().sum()).backward()
        scaler.step(scaled)
        scaler.update()
        plain.zero_grad(), scaled.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    scaler.scale(other(x * float("inf")).square().sum()).backward()
    scaler.step(scaled)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_first_steps_are_finite_and_a_copy_goes_on_the_same():
    """B begins at zero, so that BᵀB + δI is δI alone, and is nearly of rank 1 in the next step."""
    model = pretrained(mlp)
    ll.inject(model, ll.LoRAConfig(rank=4, target_modules="all"))
    optimizer = optimizer_of(model)
    fit(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    again, optimizer_again = copy.deepcopy((model, optimizer))
    for one in ((model, optimizer), (again, optimizer_again)):
        fit(*one)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_what_it_cannot_do_is_refused():
    model = pretrained(mlp)
    with pytest.raises(ConfigError, match="ScaledAdamW of Sequential: it has no updates: adapt it first"):
        ll.ScaledAdamW(model.parameters(), model)
    with pytest.raises(ConfigError, match=r"damping=0: give a number above 0"):
        ll.ScaledAdamW(model.parameters(), model_of(), damping=0)


def test_what_is_fixed_of_an_update_stays_and_has_no_part_in_the_step():
    """PiSSA's fixed factors; the preconditioner is made of what trains alone."""
    model = pretrained(mlp)
    ll.inject(model, ll.LoRAConfig(rank=2, target_modules=["0", "3"], modules_to_save=["5"], init="pissa"))
    fixed = {name: t.clone() for name, t in model.state_dict().items() if "lora_fixed" in name}
    optimizer = optimizer_of(model)
    fit(model, optimizer)
    assert len(fixed) == 4
    assert all(torch.equal(model.state_dict()[name], t) for name, t in fixed.items())
    (pair, _) = pairs_of(model)
    assert (pair.A.shape, pair.B.shape) == ((2, 6), (16, 2))
    pair.A.grad, pair.B.grad = torch.randn(2, 6), torch.randn(16, 2)
    found = preconditioned([pair], 1e-3)
    wanted = torch.linalg.solve(pair.B.T @ pair.B + 1e-3 * torch.eye(2), pair.A.grad)
    torch.testing.assert_close(found[pair.A], wanted, rtol=1e-4, atol=1e-5)
