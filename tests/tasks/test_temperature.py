"""The fitted temperature against a grid, and what it must leave alone."""

import numpy as np
import pytest
import torch

from lora_lightning.tasks.temperature import cross_entropy, fitted_temperature


def drawn(scale: float, count: int = 400, classes: int = 6, several: bool = False):
    """Logits, and truths drawn from the probabilities of logits / scale."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * scale * torch.randn(count, classes, generator=generator)
    if several:
        return logits, torch.bernoulli((logits / scale).sigmoid(), generator=generator)
    return logits, torch.multinomial((logits / scale).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_it_is_the_best_of_a_grid(scale, several):
    logits, truths = drawn(scale, several=several)
    found = fitted_temperature(logits, truths)
    assert found == pytest.approx(scale, rel=0.2)
    grid = np.geomspace(scale / 3, scale * 3, 400)
    best = min(grid, key=lambda t: cross_entropy(logits, truths, t))
    assert found == pytest.approx(best, rel=0.01)
    least = cross_entropy(logits, truths, found)
    assert all(cross_entropy(logits, truths, found * f) > least for f in (0.999, 1.001))


def test_what_cannot_be_fitted():
    """Nothing, no numbers, and logits that separate the classes, whose best temperature is 0: that would make
    every mistake elsewhere a certainty."""
    assert fitted_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)) == 1
    assert fitted_temperature(torch.full((2, 3), float("nan")), torch.tensor([0, 1])) == 1
    assert fitted_temperature(torch.eye(3), torch.arange(3)) == 1
    assert fitted_temperature(torch.tensor([[3.0, -2.0]]), torch.tensor([[1, 0]])) == 1
    assert fitted_temperature(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(20)
