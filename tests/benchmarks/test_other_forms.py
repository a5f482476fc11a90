"""The benchmark of other forms: what each form is, which rates are tried, and that nothing is done twice."""

import math

import pytest
import torch
from torch.linalg import matrix_rank

from benchmarks import other_forms
from benchmarks.forms import FORMS, SSVD, HiRA, LoKr, Tucker, VeRA, budget, random_factors
from benchmarks.other_forms import Runs, difference, tune

WEIGHTS = {"linear": (96, 64), "convolution": (32, 24, 3, 3), "narrow": (24, 3, 3, 3)}
FEW = {"vera", "lora_1"}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_begins_as_the_weight_and_trains_as_much_as_lora(form, kind):
    weight = torch.randn(WEIGHTS[kind])
    update = FORMS[form](weight)
    torch.testing.assert_close(update(weight), weight, atol=1e-5, rtol=1e-5)
    count = sum(p.numel() for p in update.parameters())
    if form not in FEW | {"full"} and kind != "narrow":
        assert 0.5 * budget(weight) < count < 1.25 * budget(weight)  # SSVD has no more than its side allows


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_of_a_form_learns(form):
    weight = torch.randn(32, 24, 3, 3)
    update = FORMS[form](weight)
    optimizer = torch.optim.SGD(update.parameters(), lr=0.01)
    for _ in range(2):  # what is multiplied by zeros learns from the second step on
        optimizer.zero_grad()
        (update(weight) * torch.ones_like(weight).cumsum(0)).sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in update.parameters())


def moved(form, weight):
    update = form(weight)
    for parameter in update.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return update, (update(weight) - weight).detach()


def test_hira_multiplies_by_elements_and_is_of_high_rank():
    weight = torch.randn(32, 24)
    update, delta = moved(HiRA, weight)
    A, B = update.A.tolist(), update.B.tolist()
    product = [[sum(B[o][r] * A[r][i] for r in range(4)) for i in range(24)] for o in range(32)]
    torch.testing.assert_close(delta, weight * torch.tensor(product))
    assert matrix_rank(delta) == 24 and matrix_rank(delta / weight) == 4


def test_tucker_has_a_higher_rank_at_as_many_parameters():
    weight = torch.randn(32, 24, 3, 3)
    update, delta = moved(Tucker, weight)
    assert matrix_rank(delta.flatten(1), rtol=1e-4) == update.B.shape[1] > 4


def test_kroneckers_product_is_torchs_own():
    weight = torch.randn(32, 24)
    update, delta = moved(LoKr, weight)
    torch.testing.assert_close(delta, torch.kron(update.C, update.D))


def test_veras_layers_share_what_is_random():
    weight = torch.randn(32, 24)
    update, delta = moved(VeRA, weight)
    A, B = random_factors()
    torch.testing.assert_close(
        delta, torch.diag(update.b) @ B[:32] @ torch.diag(update.d) @ A[:, :24], atol=1e-4, rtol=1e-4
    )


def test_ssvd_turns_the_right_singular_vectors_alone():
    weight = torch.randn(32, 24)
    update = SSVD(weight)
    torch.nn.init.normal_(update.skew)
    turned = update(weight).detach()
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(weight))
    torch.testing.assert_close(
        turned @ turned.T, weight @ weight.T, atol=1e-4, rtol=1e-4
    )  # the left ones stay


@pytest.fixture
def trainings(monkeypatch):
    """Trainings whose accuracy falls with the distance of the rate from the best one."""
    asked = []

    def train(model, form, n, seed):
        asked.append((n, seed))
        return {
            "model": model,
            "form": form,
            "n": n,
            "seed": seed,
            "val": 90.0 - abs(n - 5),
            "test": 80.0 + seed,
        }

    monkeypatch.setattr(other_forms, "train", train)
    return asked


def test_the_best_rate_lies_inside_and_nothing_is_trained_twice(trainings, tmp_path):
    path = tmp_path / "runs.jsonl"
    assert tune(Runs(path), "vit", "lora") == 5
    rates = [n for n, seed in trainings if seed == 0]
    assert min(rates) < 5 < max(rates) and len(rates) >= 5
    assert len(trainings) == len(set(trainings)) == len(rates) + 4  # two rates, two more seeds
    before = len(trainings)
    assert tune(Runs(path), "vit", "lora") == 5 and len(trainings) == before


def test_differences_are_taken_seed_by_seed():
    base = [70.0, 80.0, 60.0, 75.0, 65.0]
    assert difference(base, [b + 1 for b in base]) == "+1.0 ± 0.0"
    apart = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert difference(base, [b + a for b, a in zip(base, apart, strict=True)]) == f"+3.0 ± {half:.1f}"
