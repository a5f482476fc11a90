"""Truncated decompositions against numpy's dense ones, and choices of ranks against all choices."""

import itertools

import numpy as np
import pytest
import torch

from lora_lightning.methods.truncation import (
    Decomposed,
    decomposed,
    decomposed_product,
    rank_by_energy,
    ranks_by_budget,
)


def falling(groups, m, k, power=0.7):
    """A matrix of known singular values, as changes of trained weights fall."""
    torch.manual_seed(0)
    U, S, V = torch.linalg.svd(torch.randn(groups, m, k, dtype=torch.float64), full_matrices=False)
    values = torch.arange(1, S.shape[1] + 1, dtype=S.dtype) ** -power
    return U * values @ V


def truncated(matrix, rank):
    U, S, V = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy(U[..., :rank] * S[..., None, :rank] @ V[..., :rank, :]), torch.from_numpy(S)


SIZES = [(1, 6, 9, 2), (3, 5, 4, 2), (2, 130, 140, 40), (1, 140, 131, 70), (1, 200, 90, 3)]


@pytest.mark.parametrize(("groups", "m", "k", "rank"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_approximation_and_its_error(groups, m, k, rank, dtype):
    matrix = falling(groups, m, k).to(dtype)
    best, values = truncated(matrix, rank)
    for whole in (decomposed(matrix), decomposed(matrix, rank)):
        left, right = whole.factors(rank)
        assert left.shape == (groups, m, rank) and right.shape == (groups, rank, k)
        torch.testing.assert_close(left @ right, best, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=1e-8, atol=1e-8)  # balanced
        lost = (matrix - best).norm() / matrix.norm().double()
        assert whole.error(rank) == pytest.approx(lost.item(), rel=1e-6)
        assert whole.norm == pytest.approx(matrix.double().norm().item())
        torch.testing.assert_close(whole.values[:, :rank], values[:, :rank], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 0.7])
def test_the_sketch_of_a_large_matrix_loses_no_more_than_it_says(power):
    matrix = falling(1, 170, 180, power) if power else torch.randn(1, 170, 180, dtype=torch.float64)
    before = torch.get_rng_state()
    whole = decomposed(matrix, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert whole.values.shape[1] < 170  # a sketch
    left, right = whole.factors(2)
    lost, (best, _) = (matrix - left @ right).norm(), truncated(matrix, 2)
    assert whole.error(2) == pytest.approx((lost / matrix.norm()).item(), rel=1e-9)
    excess = lost / (matrix - best).norm() - 1
    assert excess < (1e-6 if power else 1e-3)
    assert torch.equal(decomposed(matrix, 2).values, whole.values)


def test_a_product_is_decomposed_as_the_matrix_that_it_is():
    torch.manual_seed(0)
    left, right = torch.randn(2, 30, 5), torch.randn(2, 5, 20)
    thin, dense = decomposed_product(left, right), decomposed(left.double() @ right.double())
    torch.testing.assert_close(thin.values, dense.values[:, :5])
    for one, other in zip(thin.factors(3), dense.factors(3), strict=True):
        torch.testing.assert_close(one.abs(), other.abs())
    assert thin.error(5) == 0 and thin.error(3) == pytest.approx(dense.error(3))


def test_a_matrix_of_lower_rank_or_zero():
    torch.manual_seed(0)
    for m, k in ((9, 7), (140, 150)):  # by LAPACK, by the Gram matrix
        low = torch.randn(1, m, 3, dtype=torch.float64) @ torch.randn(1, 3, k, dtype=torch.float64)
        whole = decomposed(low)
        assert rank_by_energy(whole, 1.0) == 3
        left, right = whole.factors(m)  # more than there is
        torch.testing.assert_close(left @ right, low)
        nothing = decomposed(torch.zeros(1, m, k))
        assert nothing.norm == nothing.error(0) == 0 == rank_by_energy(nothing, 1.0)
        assert all(torch.isfinite(t).all() for t in nothing.factors(2))


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_smallest_rank_that_keeps_the_energy(energy):
    matrix = falling(2, 12, 10)
    gains = np.square(np.linalg.svd(matrix.numpy(), compute_uv=False)).sum(0)
    kept = np.concatenate([[0], np.cumsum(gains)]) / gains.sum()
    assert rank_by_energy(decomposed(matrix), energy) == int(np.argmax(kept >= energy - 1e-12))


def diagonal(*values):
    S = torch.tensor([values], dtype=torch.float64)
    eye = torch.eye(len(values), dtype=torch.float64)[None]
    return Decomposed(eye, S, eye)


def test_a_budget_is_shared_out_as_the_best_of_all_choices_does():
    wholes = {"a": diagonal(5, 3, 1), "b": diagonal(4, 3.5, 0), "c": diagonal(2, 2, 2)}
    for costs in ({"a": 1, "b": 1, "c": 1}, {"a": 4, "b": 2, "c": 1}):
        for budget in range(1, 22):
            ranks = ranks_by_budget(wholes, costs, budget)
            spent = sum(costs[n] * r for n, r in ranks.items())
            assert spent <= budget
            best = max(
                kept(wholes, dict(zip(costs, choice, strict=True)))
                for choice in itertools.product(range(4), repeat=3)
                if sum(c * r for c, r in zip(costs.values(), choice, strict=True)) <= spent
            )
            assert kept(wholes, ranks) == pytest.approx(best) or costs["a"] != costs["b"]
            if spent == budget and costs["a"] == 4 and budget in (2, 4, 5):
                assert kept(wholes, ranks) == pytest.approx(best)
    assert ranks_by_budget(wholes, costs, 1000) == {"a": 3, "b": 2, "c": 3}  # what holds nothing is not kept


def kept(wholes, ranks):
    return sum(sum(wholes[n].gains[:r]) for n, r in ranks.items())
