"""The searches of rates: they end with the best rate inside, and a stopped one repeats nothing."""

import json
import math

import pytest

from benchmarks import rate_by_rank, tune_digits


@pytest.mark.parametrize("best", [1e-4, 3e-3, 7e-2])
def test_the_best_rate_is_found_from_afar(best):
    asked = []

    def loss(lr):
        asked.append(lr)
        return 1.5 + math.log2(lr / best) ** 2

    assert rate_by_rank.best_rate(loss, 4e-3) == pytest.approx(best, rel=1e-4)
    assert len(asked) == len(set(asked)) <= rate_by_rank.MOST
    assert rate_by_rank.on_grid(best, 4e-3) in asked


def test_a_run_that_ends_in_nothing_is_the_worst():
    losses = {0.004: 1.0, 0.002: 2.0, 0.008: math.inf}
    assert rate_by_rank.best_rate(losses.__getitem__, 0.004) == 0.004


def test_the_exponent_of_the_rank():
    assert rate_by_rank.exponent({1: 8e-3, 2: 4e-3, 8: 1e-3}) == pytest.approx((-1, 0))
    assert rate_by_rank.exponent({1: 8e-3, 4: 8e-3}) == (0, 0)
    e, error = rate_by_rank.exponent({1: 2e-3, 2: 8e-3, 4: 2e-3})
    assert (e, error) == pytest.approx((0, math.sqrt(4 / 3)))  # residuals -2/3, 4/3, -2/3


def test_every_way_is_the_same_at_one_rank_and_a_stopped_search_repeats_nothing(tmp_path):
    """At rank 8 the runs of one way are those of all."""
    done = []

    def run(model, rank, scaling, lr):
        if len(done) == most:
            raise KeyboardInterrupt
        done.append((rank, scaling, lr))
        return {"val_loss": math.log2(lr * scaling * rank / 0.1) ** 2}

    def best(way):
        runs = rate_by_rank.Runs(tmp_path / "runs.json", run)
        return dict(rate_by_rank.best_rates(runs, "vit", way))

    most = 7
    with pytest.raises(KeyboardInterrupt):
        best("twice")
    most = 1000
    found = best("twice")
    assert len(done) == len(set(done)) == len(json.loads((tmp_path / "runs.json").read_text())["runs"])
    assert found == pytest.approx({rank: 0.05 / rank for rank in rate_by_rank.RANKS}, rel=1e-4)
    assert rate_by_rank.exponent(found)[0] == pytest.approx(-1, abs=1e-4)
    before = len(done)
    assert best("constant")[8] == found[8]
    assert not [rank for rank, _, _ in done[before:] if rank == 8]


def test_a_stopped_search_of_the_digits_rates_goes_on(tmp_path, monkeypatch):
    """With one more rate where the best lies at an edge; the chosen one alone is tested."""
    done, tested = [], []

    def run(name, method, lr, seed):
        if len(done) == most:
            raise KeyboardInterrupt
        done.append((lr, seed))
        return -abs(math.log2(lr / 8e-3)) - seed, lambda: tested.append((lr, seed)) or 90.0, 5

    monkeypatch.setattr(tune_digits, "RESULTS", tmp_path)
    monkeypatch.setattr(tune_digits, "run", run)
    most = 4
    with pytest.raises(KeyboardInterrupt):
        tune_digits.tune(tune_digits.Runs("vit"), "lora", (1e-3, 2e-3, 4e-3))
    most = 100
    runs = tune_digits.Runs("vit")
    assert tune_digits.tune(runs, "lora", (1e-3, 2e-3, 4e-3)) == 8e-3
    assert len(done) == len(set(done)) == 15  # five rates
    assert runs.chosen("lora", 8e-3) == {"lr": 8e-3, "test_acc": [90.0] * 3, "trained": 5}
    assert tested == [(8e-3, seed) for seed in range(3)]
    again = tune_digits.Runs("vit")
    assert again.chosen("lora", 8e-3)["test_acc"] == [90.0] * 3 and len(done) == 15


def test_what_was_measured_is_what_the_table_says():
    """With s = 2 the best rate falls with the rank; with alpha / √r it does so far less."""
    runs = rate_by_rank.Runs(rate_by_rank.RESULTS / "rate_by_rank.json", rate_by_rank.missing)
    written = (rate_by_rank.RESULTS / "rate_by_rank.md").read_text()
    for model in ("vit", "resnet"):
        found = {way: dict(rate_by_rank.best_rates(runs, model, way)) for way in rate_by_rank.SCALINGS}
        assert "\n".join(rate_by_rank.table(model, found)) in written
        twice, steady = (rate_by_rank.exponent(found[way])[0] for way in ("twice", "rslora"))
        assert twice < -0.3
        assert abs(steady) < 0.2
        assert {tuple(sorted(found[way])) for way in ("twice", "rslora")} == {rate_by_rank.RANKS}


@pytest.mark.slow
def test_rslora_keeps_the_best_rate_and_twice_the_rank_does_not(tmp_path):
    """The ViT of the digits at ranks 2 and 32, trained anew."""
    runs = rate_by_rank.Runs(tmp_path / "runs.json", rate_by_rank.run)
    apart = {}
    for way in ("twice", "rslora"):
        best = dict(rate_by_rank.best_rates(runs, "vit", way, ranks=(2, 32)))
        apart[way] = best[2] / best[32]
    assert apart["twice"] > 2 > apart["rslora"] > 0.5
