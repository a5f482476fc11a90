"""Spectra by small matrices, against numpy's singular values of the dense updates."""

import numpy as np
import pytest
import torch

from lora_lightning.methods.spectra import effective_rank, spectra_of, stable_rank


def test_spectra_are_those_of_the_dense_products():
    torch.manual_seed(0)
    shapes = {"a": (1, 9, 3, 7), "b": (1, 9, 3, 7), "c": (2, 4, 2, 12), "d": (1, 3, 3, 30)}
    factors = {n: (torch.randn(g, m, r), torch.randn(g, r, k)) for n, (g, m, r, k) in shapes.items()}
    weights = {n: torch.tensor(float(i + 1)) for i, n in enumerate(shapes)}
    found = spectra_of(factors, weights)
    assert list(found) == list(shapes)
    for name, (left, right) in factors.items():
        dense = np.linalg.svd((left.double() @ right.double()).numpy(), compute_uv=False)
        values = dense[:, : left.shape[2]]
        one = found[name]
        np.testing.assert_allclose(one.values.numpy(), values, rtol=1e-9)
        p = values / values.sum(1, keepdims=True)
        assert one.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum(1)).mean())
        assert one.stable_rank == pytest.approx((np.square(values).sum(1) / values[:, 0] ** 2).mean())
        assert one.norm == pytest.approx(np.linalg.norm(values))
        assert one.relative == pytest.approx(one.norm / weights[name].item())
    mean = found.mean()
    assert mean["effective_rank"] == pytest.approx(np.mean([s.effective_rank for s in found.values()]))
    assert spectra_of(factors)["a"].relative is None
    assert "relative_norm" not in spectra_of(factors).mean()


def test_ranks_of_equal_values_are_their_number_and_of_nothing_zero():
    values = torch.tensor([[2.0, 2, 2, 0], [5, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(values), values.new_tensor([3, 1, 0]))
    torch.testing.assert_close(stable_rank(values), values.new_tensor([3, 1, 0]))
    zero = spectra_of({"a": (torch.zeros(1, 4, 2), torch.randn(1, 2, 3))})["a"]
    assert zero.effective_rank == zero.stable_rank == zero.norm == 0


def test_the_table_has_layers_that_repeat_in_a_row():
    torch.manual_seed(0)
    factors = {f"blocks.{i}.fc": (torch.randn(1, 4, 2), torch.randn(1, 2, 3)) for i in range(3)}
    lines = str(spectra_of(factors)).splitlines()
    assert len(lines) == 3 and "blocks.*.fc" in lines[2] and " 3 " in lines[2]
    assert str(spectra_of({})) == "no layer is adapted"
