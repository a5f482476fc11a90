"""Second moments and their spectra against numpy's SVD of all rows together."""

import numpy as np
import pytest
import torch

from lora_lightning.errors import UserError
from lora_lightning.methods import moments
from lora_lightning.methods.moments import Moments, spectrum_of
from lora_lightning.methods.ranks import by_budget, by_energy, explained


def decaying(rows: int, columns: int, groups: int = 1) -> torch.Tensor:
    """Rows whose spectrum falls as that of inputs does."""
    numbers = torch.Generator().manual_seed(0)
    scale = torch.arange(1, columns + 1, dtype=torch.float64) ** -1.0
    turned = torch.linalg.qr(torch.randn(columns, columns, generator=numbers, dtype=torch.float64)).Q
    return torch.randn(groups, rows, columns, generator=numbers, dtype=torch.float64) * scale @ turned


@pytest.mark.parametrize(("sketched", "tolerance"), [(False, 1e-10), (True, 3e-2)])
def test_moments_have_the_singular_values_and_vectors_of_all_rows(sketched, tolerance, monkeypatch):
    monkeypatch.setattr(moments, "EXACT", 40 if sketched else 1024)
    monkeypatch.setattr(moments, "SKETCH", 40)
    X = decaying(300, 120, groups=2)
    seen = Moments(120, groups=2, rank=4)
    for part in X.split(50, 1):
        seen.add(part)
    found = seen.spectrum()
    assert (seen.probes is None) != sketched
    for group in range(2):
        _, S, V = np.linalg.svd(X[group].numpy(), full_matrices=False)
        np.testing.assert_allclose(found.energies[group, :4], S[:4] ** 2, rtol=tolerance)
        overlap = found.right[group, :4].numpy() @ V[:4].T
        np.testing.assert_allclose(np.abs(np.linalg.det(overlap)), 1, rtol=tolerance)
    shares = found.shares()
    assert shares == sorted(shares, reverse=True)
    values = [np.linalg.svd(x, compute_uv=False) for x in X.numpy()]
    assert abs(sum(shares[:4]) - sum(v[:4] @ v[:4] for v in values) / X.square().sum()) < tolerance


def test_a_sketch_is_exact_up_to_its_rank(monkeypatch):
    monkeypatch.setattr(moments, "EXACT", 10)
    monkeypatch.setattr(moments, "SKETCH", 12)
    X = decaying(8, 60)
    seen = Moments(60)
    seen.add(X)
    S = np.linalg.svd(X[0].numpy(), compute_uv=False)
    np.testing.assert_allclose(seen.spectrum().energies[0, :8], S**2, rtol=2e-3)


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 5)])
def test_the_spectrum_of_a_gradient(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = spectrum_of(matrices)
    again = found.left * found.energies.sqrt().unsqueeze(1) @ found.right
    torch.testing.assert_close(again, matrices.double())
    assert spectrum_of(torch.zeros(1, 3, 4)).shares() == [0.0, 0.0, 0.0]
    with pytest.raises(UserError, match="NaN or infinity"):
        spectrum_of(torch.full((1, 2, 2), torch.inf))


def test_signs_do_not_depend_on_the_machine():
    X = decaying(20, 6)
    first, second = Moments(6), Moments(6)
    first.add(X)
    second.add(-X)
    assert torch.equal(first.spectrum().right, second.spectrum().right)


def test_budget_and_energy():
    shares = {"wide": [0.5, 0.3, 0.2], "thin": [0.4, 0.3, 0.0]}
    costs, sides = {"wide": 10, "thin": 1}, {"wide": 3, "thin": 3}
    assert by_budget(shares, costs, sides, 11) == {"wide": 1, "thin": 1}
    assert by_budget(shares, costs, sides, 22) == {"wide": 2, "thin": 2}
    assert by_budget(shares, costs, sides, 1000) == {"wide": 3, "thin": 2}  # what explains nothing is left
    assert by_budget(shares, costs, {"wide": 1, "thin": 3}, 1000) == {"wide": 1, "thin": 2}
    assert [by_energy([0.5, 0.3, 0.2], 3, e) for e in (0.1, 0.5, 0.79, 0.81)] == [1, 1, 2, 3]
    assert by_energy([0.5, 0.3, 0.2], 2, 0.99) == 2 and by_energy([], 3, 0.5) == 1
    assert explained([0.5, 0.3], 1) == 0.5 and explained([0.7, 0.4], 2) == 1.0
