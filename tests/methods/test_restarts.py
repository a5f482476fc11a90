"""ReLoRA's restarts of an update: for every family, in plain torch, in files; the steps of a training."""

import copy

import peft
import pytest
import torch
from families import CASES, base_model, config, equal, in_mode, loss, run, same_flags, typical_cases
from small import mlp
from torch import nn

import lora_lightning as ll
from lora_lightning.adapters.restarts import done, updates_of
from lora_lightning.layers import factors
from lora_lightning.methods.restarts import restart_steps


@pytest.mark.parametrize(
    ("restarts", "steps", "wanted"),
    [(1, 10, [5]), (2, 30, [10, 20]), (3, 10, [2, 5, 7]), (3, 4, [1, 2, 3]), (0, 9, [])],
)
def test_restarts_are_spread_evenly(restarts, steps, wanted):
    assert restart_steps(restarts, steps) == wanted


def product(A: torch.Tensor, B: torch.Tensor, update) -> torch.Tensor:
    """B·A by groups, with sums over the indices."""
    a, b = (t.unflatten(0, (update.slot.groups, -1)).flatten(2) for t in (A, B))
    if update.slot.transposed:
        return torch.einsum("gri,gro->gio", a, b).flatten()
    return torch.einsum("gor,gri->goi", b, a).flatten()


@typical_cases
def test_what_was_learned_is_kept_and_A_and_B_begin_anew(name):
    """Twice, so that all places are taken: the whole update is the sum of the products that there were."""
    model, inputs = base_model(name, torch.float64), CASES[name].inputs(torch.float64)
    ll.inject(model, config(name, restarts=2))
    updates, terms = updates_of(model, "default"), []
    assert all(u.total_rank == 3 * u.rank and u.is_zero() for u in updates)
    for number in (1, 2, 3):
        for update in updates:
            nn.init.normal_(update.lora_A, std=0.3)
            nn.init.normal_(update.lora_B, std=0.3)
        terms.append([product(u.lora_A.detach(), u.lora_B.detach(), u).clone() for u in updates])
        if number < 3:
            before = run(model, inputs)
            ll.restart(model)
            for one, other in zip(run(model, inputs), before, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
            for u in updates:
                assert not getattr(u, f"lora_{u.slot.zero}").any() and not u.is_zero()
                assert (u.lora_A if u.slot.zero == "B" else u.lora_B).any()
            assert done(model, "default") == number
    for update, *learned in zip(updates, *terms, strict=True):
        left, right = update.thin_factors()
        torch.testing.assert_close((left @ right).flatten(), update.scaling * sum(learned))
    with pytest.raises(ll.UserError, match="no restart left of restarts=2"):
        ll.restart(model)


KEPT = ["Conv2d-groups", "ConvTranspose1d-groups", "Embedding-padding", "LSTM-gates-dora", "Linear-dora"]


@pytest.mark.parametrize("name", KEPT)
def test_what_comes_out_is_an_adapter_like_any(name, tmp_path):
    """Saved and loaded, switched off, merged, copied into a plain adapter; DoRA's magnitudes go on."""
    model, inputs = base_model(name), CASES[name].inputs()
    ll.inject(model, config(name, restarts=1))
    optimizer = torch.optim.AdamW(ll.lora_parameters(model), lr=0.05)
    for _ in range(2):
        for _ in range(3):
            optimizer.zero_grad()
            loss(run(model, inputs)).backward()
            optimizer.step()
        if not done(model, "default"):
            kept = [p.clone() for p in ll.lora_parameters(model) if p.dim() == 1]
            ll.restart(model, optimizer)
            assert len(optimizer.state) == len(kept)  # those of the magnitudes
            assert equal(kept, [p for p in ll.lora_parameters(model) if p.dim() == 1]) or not kept
    model.eval()
    wanted, again = run(model, inputs), base_model(name).eval()
    ll.save_adapter(model, tmp_path)
    ll.load_adapter(again, tmp_path)
    assert equal(run(again, inputs), wanted) and done(again, "default") == 1
    with torch.no_grad(), ll.adapters_off(model):
        assert equal(run(model, inputs), run(in_mode(same_flags(name, model), False), inputs))
    if "dora" not in name:
        ll.combine(model, ["default"], [1.0], into="plain")
        assert not any(u.fixed for u in updates_of(model, "plain"))
        assert model.lora_state.adapters["plain"].config.restarts == 0
        ll.set_adapter(model, "plain")
        for one, other in zip(run(model, inputs), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_training_is_relora_by_hand(monkeypatch):
    """On nn.Linear: after each cycle W ← W + s·B·A, new A and B, a new optimizer."""
    fresh = iter(torch.linspace(-1, 1, 3 * 2 * 6).view(3, 2, 6).sin())
    monkeypatch.setitem(factors.INITS, "default", lambda A: A.copy_(next(fresh)))
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(6, 4))
    W = model[0].weight.detach().clone()
    ll.inject(model, ll.LoRAConfig(rank=2, alpha=6, restarts=2, target_modules=["0"], modules_to_save=None))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(12):
        if step in restart_steps(2, 12):
            ll.restart(model, optimizer)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    bias = model[0].bias.detach()
    for A in torch.linspace(-1, 1, 3 * 2 * 6).view(3, 2, 6).sin():
        A, B = A.clone().requires_grad_(), torch.zeros(4, 2, requires_grad=True)
        by_hand = torch.optim.AdamW([A, B], lr=0.05)
        for _ in range(4):
            by_hand.zero_grad()
            (x @ (W + 3 * B @ A).T + bias - y).square().mean().backward()
            by_hand.step()
        W = (W + 3 * B @ A).detach()
    torch.testing.assert_close(model[0].weight.detach(), W, rtol=1e-5, atol=1e-6)


def test_peft_gets_the_whole_update_as_one_of_a_higher_rank(tmp_path):
    model, x = mlp(), torch.randn(5, 6)
    base = copy.deepcopy(model)
    ll.inject(model, ll.LoRAConfig(rank=2, alpha=3, restarts=1))
    for update in updates_of(model, "default"):
        nn.init.normal_(update.lora_B)
    ll.restart(model)
    for update in updates_of(model, "default"):
        nn.init.normal_(update.lora_B)
    ll.save_adapter(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert theirs.peft_config["default"].r == 4
    torch.testing.assert_close(theirs(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_an_init_that_is_taken_off_keeps_its_place():
    """PiSSA begins at B0·A0, which the first columns take off; the terms come behind them."""
    model, x = mlp(), torch.randn(5, 6)
    ll.inject(model, ll.LoRAConfig(rank=2, init="pissa", restarts=2))
    updates = updates_of(model, "default")
    kept = [u.lora_fixed_B[:, : u.rank].clone() for u in updates]
    for number in (1, 2):
        for update in updates:
            nn.init.normal_(update.lora_B)
        before = model(x)
        ll.restart(model)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        assert done(model, "default") == number
    assert all(torch.equal(u.lora_fixed_B[:, : u.rank], b) for u, b in zip(updates, kept, strict=True))
    assert {u.fixed // u.rank for u in updates} == {3}


def test_what_has_no_room_is_refused():
    model = mlp()
    with pytest.raises(ll.UserError, match="not an adapted model"):
        ll.restart(model)
    ll.inject(model, ll.LoRAConfig(rank=2))
    with pytest.raises(ll.UserError, match=r"no restart left of restarts=0.*give LoRAConfig"):
        ll.restart(model)
    with pytest.raises(ll.ConfigError, match="restarts=-1: give a whole number of at least 0"):
        ll.LoRAConfig(restarts=-1)
    with pytest.raises(ll.ConfigError, match=r"restarts=1: .*dropout"):
        ll.LoRAConfig(restarts=1, dropout=0.1)
