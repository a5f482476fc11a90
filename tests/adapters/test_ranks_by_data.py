"""Ranks by data against numpy: shared out within a budget, or by the energy that each layer needs."""

import numpy as np
import pytest
import torch
from small import BATCHES, cnn, pretrained
from torch import Tensor, nn

import lora_lightning as ll


def conv_shares(model: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    """By numpy, of the two adapted convolutions of `cnn` in eval mode."""
    model.eval()
    with torch.no_grad():
        first = model[:3](x)
        third = model[3:6](first)
    padded = nn.functional.pad(first, (1, 1, 1, 1), mode="reflect")
    found = {}
    for name, y, options in (("3", padded, {"stride": 2}), ("6", third, {"dilation": 2, "padding": 2})):
        X = nn.functional.unfold(y, 3, **options).movedim(1, -1).flatten(0, 1).double().numpy()
        S = np.linalg.svd(X, compute_uv=False)
        found[name] = S**2 / (S**2).sum()
    return found


def test_the_budget_is_shared_out_by_explained_variance():
    """The ranks beat every other choice within the budget, tried one by one."""
    model, twin = pretrained(cnn), pretrained(cnn)
    x = BATCHES[cnn]()
    shares, costs = conv_shares(twin, x), {"3": 8 * 9 + 12, "6": 12 * 9 + 12}
    settings = ll.LoRAConfig(rank="auto", budget=1000, rho=100.0)
    plan = ll.inject(model, settings, data=[x])
    ranks = {p.name: p.rank for p in plan.layers}
    assert sum(costs[n] * r for n, r in ranks.items()) == sum(p.parameters for p in plan.layers) <= 1000

    def worth(ranks):
        return sum(shares[n][:r].sum() for n, r in ranks.items())

    others = [{"3": a, "6": b} for a in range(1, 13) for b in range(1, 13)]
    best = max(worth(o) for o in others if sum(costs[n] * r for n, r in o.items()) <= 1000)
    assert best - worth(ranks) < 0.02  # the last component may not fit
    for layer in plan.layers:
        assert abs(layer.explained - shares[layer.name][: layer.rank].sum()) < 1e-5
    assert "by the inputs of the layers in 1 batch" in str(plan) and "%)" in str(plan)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_energy_takes_the_smallest_rank_that_explains_it(share):
    model, x = pretrained(cnn), BATCHES[cnn]()
    shares = conv_shares(pretrained(cnn), x)
    plan = ll.inject(model, ll.LoRAConfig(rank=f"energy:{share}"), data=[x])
    for layer in plan.layers:
        wanted = int(np.searchsorted(np.cumsum(shares[layer.name]), share)) + 1
        assert layer.rank == min(wanted, 12)


def test_rank_pattern_wins_and_pays_from_the_budget():
    model = pretrained(cnn)
    settings = ll.LoRAConfig(rank="auto", budget=1000, rank_pattern={"6": 5}, alpha=3.0)
    plan = ll.inject(model, settings, data=[BATCHES[cnn]()])
    ranks = {p.name: p.rank for p in plan.layers}
    assert ranks["6"] == 5 and ranks["3"] == (1000 - 5 * 120) // 84
    assert [p.explained is None for p in plan.layers] == [False, True]
    assert [p.alpha for p in plan.layers] == [3.0, 3.0]


def test_a_budget_may_be_a_share_of_the_model_and_is_that_of_rank_8_by_default():
    for budget, most in (
        (None, 8 * (84 + 120)),
        (0.25, 0.25 * sum(p.numel() for p in pretrained(cnn).parameters())),
    ):
        plan = ll.inject(pretrained(cnn), ll.LoRAConfig(rank="auto", budget=budget), data=[BATCHES[cnn]()])
        spent = sum(p.parameters for p in plan.layers)
        assert most - 120 < spent <= most
