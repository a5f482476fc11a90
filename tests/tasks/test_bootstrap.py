"""Bootstrap intervals: seeded, against resamples drawn one by one, and how often they cover the truth."""

import numpy as np
import pytest

from lora_lightning.tasks import bootstrap
from lora_lightning.tasks.bootstrap import group_sums, intervals, resampled


def mean_of(values):
    return lambda counts: (counts @ values / counts.sum(1))[:, None]


def test_resamples_are_of_the_right_size_and_the_same_in_any_blocks(monkeypatch):
    counts = resampled(lambda c: c, 30, 50)
    assert counts.shape == (50, 30)
    assert (counts.sum(1) == 30).all()
    assert len(np.unique(counts, axis=0)) == 50
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * 30)
    assert (resampled(lambda c: c, 30, 50) == counts).all()
    assert (resampled(lambda c: c, 30, 50, seed=1) != counts).any()


def test_an_interval_is_that_of_resamples_drawn_one_by_one():
    values = np.random.default_rng(5).exponential(size=80).astype(np.float32)
    found = intervals(mean_of(values), 80, 4000)[0]
    generator = np.random.default_rng(9)
    means = [generator.choice(values, 80).mean() for _ in range(4000)]
    assert found == pytest.approx(np.quantile(means, (0.025, 0.975)), rel=0.03)


def test_a_mirrored_interval_holds_its_value():
    differences = np.linspace(-1, 1, 30)  # whose mean is 0, as hardly any resample's

    def far(counts):
        return np.abs(counts @ differences)[:, None] / counts.sum(1, keepdims=True)

    value = abs(differences.mean())
    low, high = intervals(far, 30, basic=True)[0]
    assert 0 <= low <= value <= high


def test_sums_of_groups():
    generator = np.random.default_rng(0)
    counts, groups = (
        generator.integers(5, size=(3, 20)),
        generator.integers(4, size=20) * 2,
    )  # odd ones are empty
    values = generator.random(20)
    expected = [[(row * values)[groups == g].sum() for g in range(8)] for row in counts]
    np.testing.assert_allclose(group_sums(counts, groups, 8, values), expected)
    assert (group_sums(counts, groups, 8).sum(1) == counts.sum(1)).all()


def test_what_no_resample_has_is_no_number():
    found = intervals(lambda c: np.stack([c[:, 0] * np.nan, c.mean(1)], 1), 4, 10)
    assert np.isnan(found[0]).all()
    assert (found[1] == 1).all()


@pytest.mark.parametrize("trials", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_the_truth_is_covered_as_often_as_it_says(trials):
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(trials):
        right = (generator.random(120) < 0.8).astype(np.float32)
        low, high = intervals(mean_of(right), 120, 300, seed=trial)[0]
        hits += low <= 0.8 <= high
    slack = 3 * (0.95 * 0.05 / trials) ** 0.5 + 0.015  # of the trials, and of few pictures
    assert hits / trials == pytest.approx(0.95, abs=slack)
