"""benchmarks.rounding: what is left of an update, what its rows say, and that every way trains."""

import pytest

from benchmarks.rounding import WAYS, train
from benchmarks.rounding_report import summary
from benchmarks.rounding_survival import survival


def run(way, losses, validation, learned, seed=0):
    of = {"task": "digits", "precision": "bf16-true", "factor": 1.0, "way": way, "seed": seed}
    return of | {"losses": losses, "validation": validation, "learned": learned, "size": 3.0}


def test_rows_compare_with_float32_a_seed_at_a_time():
    runs = [run("before", [], (2.2, 40), (2.0, 40))]
    for seed, (first, lowest) in enumerate([(1.0, 1.0), (3.0, 1.5)]):
        runs.append(run("float32", [first, 1.0], (lowest, 60), (lowest, 60), seed))
        runs.append(run("nearest", [first + 0.5, 0.75], (lowest + 0.45, 59), (lowest + 0.25, 60), seed))
    (row,) = summary(runs)
    assert (row["way"], row["seeds"], row["size"]) == ("nearest", 2, 3.0)
    assert row["loss"] == (0.375, 0.375, 0.375)
    assert row["learned"] == pytest.approx((0.625, 0.5, 0.75))
    assert row["applied"] == pytest.approx((0.625, 0.5, 0.75))
    assert row["validation"] == pytest.approx((0.45, 0.45, 0.45))
    assert row["score"] == (-1, -1, -1)


def test_a_branch_leaves_of_a_small_update_what_rounding_to_nearest_does():
    left = {(row["case"], row["size"]): row for row in survival()}
    for case in ("branch", "nearest"):
        assert left[case, 1 / 64]["output"] < 0.1
        assert left[case, 0.25]["output"] < 0.75
        assert left[case, 16]["output"] == pytest.approx(1, abs=0.01)
    for case in ("stochastic", "nearest, float32 W"):
        for size in (1 / 64, 1 / 4, 16):
            assert left[case, size]["output"] == pytest.approx(1, abs=0.1)
    assert left["stochastic", 16]["error"] == pytest.approx(3**0.5, rel=0.02)
    assert left["nearest", 16]["error"] == pytest.approx(2**0.5, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "way"), [(p, way) for p, ways in WAYS.items() for way in ways])
def test_every_way_trains(precision, way):
    from benchmarks.rounding_tasks import Digits

    found = train(Digits(), precision, way, 1.0, 0, 5)
    assert found["losses"][0] == pytest.approx(1.748, abs=0.01)  # the same batch
    assert found["losses"][-1] < found["losses"][0]
    assert found["learned"][0] < 1.85  # 1.87 before
    assert found["validation"][0] == pytest.approx(found["learned"][0], abs=0.01)
