"""Scores against scikit-learn's and plain loops, what is logged against what intervals are of."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from lora_lightning.tasks.bootstrap import intervals
from lora_lightning.tasks.classification_scores import (
    average_precisions,
    calibration_error,
    metrics_of,
    score_intervals,
    score_values,
    scores_of,
)
from lora_lightning.tasks.classification_tables import (
    class_rates_of,
    confusion_matrix,
    most_confused,
    reliability_of,
)
from lora_lightning.tasks.predictions import Predictions


def classes(count=200, number=7, seed=0, temperature=None):
    """Predictions that are often right; class 5 is never predicted, no picture is of class 6."""
    generator = torch.Generator().manual_seed(seed)
    truths = torch.randint(0, number - 1, (count,), generator=generator)
    outputs = 2 * torch.randn(count, number, generator=generator)
    outputs[torch.arange(count), truths] += 1.5
    outputs[:, 5] -= 50
    return Predictions("class", outputs, truths, temperature=temperature)


def labels(count=150, number=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truths = (torch.rand(count, number, generator=generator) < 0.3).long()
    outputs = torch.randn(count, number, generator=generator) + 1.5 * truths - 0.7
    return Predictions("classes", (2 * outputs).round() / 2, truths)  # with ties


def numbers(count=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truths = 30 + 5 * torch.randn(count, generator=generator)
    return Predictions("number", (truths + torch.randn(count, generator=generator))[:, None], truths)


def logged(found):
    """As the task logs them."""
    collection = metrics_of(found.target, found.classes)
    for part in range(3):  # in batches
        outputs, truths = found.outputs[part::3], found.truths[part::3]
        collection.update(
            {"classes": outputs.sigmoid(), "number": outputs[:, 0]}.get(found.target, outputs), truths
        )
    return {name: float(value) for name, value in collection.compute().items()}


def test_scores_of_classes_are_scikit_learns():
    found = classes()
    truths, probabilities = found.truths.numpy(), found.probabilities().double().numpy()
    values = score_values(found)
    predicted = probabilities.argmax(1)
    assert values["acc"] == pytest.approx(metrics.accuracy_score(truths, predicted))
    assert values["f1"] == pytest.approx(metrics.f1_score(truths, predicted, average="macro"))
    top5 = metrics.top_k_accuracy_score(truths, probabilities, k=5, labels=range(7))
    assert values["top5"] == pytest.approx(top5)
    assert logged(found) == pytest.approx({k: values[k] for k in ("acc", "top5", "f1")})
    precision, recall, f1, pictures = metrics.precision_recall_fscore_support(
        truths, predicted, labels=range(7), zero_division=np.nan
    )
    rates = class_rates_of(found, with_intervals=False)
    np.testing.assert_allclose(rates.values, [precision, recall, f1], rtol=1e-6)
    assert (rates.pictures == pictures).all()
    matrix = confusion_matrix(found)
    assert (matrix == metrics.confusion_matrix(truths, predicted, labels=range(7))).all()
    pairs = most_confused(matrix, 3)
    assert [p[2] for p in pairs] == sorted(matrix[~np.eye(7, dtype=bool)])[:-4:-1]
    assert all(count == matrix[i, j] and share == count / matrix[i].sum() for i, j, count, share in pairs)


def test_scores_of_several_classes_are_scikit_learns():
    found = labels()
    truths, scores = found.truths.numpy(), found.outputs.numpy()
    values = score_values(found)
    assert values["map"] == pytest.approx(metrics.average_precision_score(truths, scores, average="macro"))
    for name, average in (("f1", "macro"), ("f1_micro", "micro")):
        assert values[name] == pytest.approx(metrics.f1_score(truths, scores > 0, average=average))
    assert logged(found) == pytest.approx({k: values[k] for k in ("map", "f1", "f1_micro")}, rel=1e-5)


def test_average_precision_of_a_resample_is_that_of_the_pictures_drawn():
    found = labels()
    draws = np.random.default_rng(0).integers(150, size=150)
    counts = np.bincount(draws, minlength=150)[None].astype(np.float32)
    expected = metrics.average_precision_score(
        found.truths.numpy()[draws], found.outputs.numpy()[draws], average=None
    )
    np.testing.assert_allclose(average_precisions(counts, found)[0], expected, rtol=1e-6)


def test_scores_of_numbers_are_scikit_learns():
    found = numbers()
    truths, predicted = found.truths.numpy(), found.predicted.numpy()
    values = score_values(found)
    assert values["mae"] == pytest.approx(metrics.mean_absolute_error(truths, predicted), rel=1e-5)
    assert values["rmse"] == pytest.approx(metrics.mean_squared_error(truths, predicted) ** 0.5, rel=1e-5)
    assert values["r2"] == pytest.approx(metrics.r2_score(truths, predicted), rel=1e-5)
    assert logged(found) == pytest.approx(values, rel=1e-4)
    one = metrics_of("number", 1)
    one.update(torch.tensor([1.0]), torch.tensor([1.0]))
    assert torch.isnan(one.compute()["r2"])


@pytest.mark.parametrize("make", [classes, labels])
def test_the_calibration_error_is_a_loop_over_bins(make):
    found = make()
    probabilities = found.probabilities(calibrated=False)
    if found.target == "class":
        sure, best = probabilities.max(1)
        right = best == found.truths
    else:
        sure, right = probabilities.flatten(), found.truths.flatten()
    expected, shares = 0.0, []
    for i in range(15):
        inside = (sure >= i / 15) & (sure < (i + 1) / 15)
        if inside.any():
            gap = abs(float(sure[inside].mean()) - float(right[inside].float().mean()))
            expected += gap * float(inside.float().mean())
        shares.append(int(inside.sum()))
    assert calibration_error(found, False) == pytest.approx(expected, abs=1e-6)
    assert score_values(found)["ece_raw"] == pytest.approx(expected, abs=1e-6)
    hits, _, counts = reliability_of(found, False)
    assert counts.tolist() == shares
    assert np.nansum(hits * counts) == pytest.approx(float(right.sum()))


def test_a_temperature_calibrates_and_changes_no_prediction():
    plain, scaled = classes(), classes(temperature=3.0)
    assert torch.equal(plain.predicted, scaled.predicted)
    assert score_values(scaled)["ece_raw"] == score_values(plain)["ece_raw"]
    assert score_values(scaled)["ece"] != score_values(plain)["ece_raw"] and "ece" not in score_values(plain)
    same = ("acc", "top5", "f1")
    assert [score_values(scaled)[n] for n in same] == [score_values(plain)[n] for n in same]
    assert torch.allclose(scaled.probabilities(), (plain.outputs / 3).softmax(1))


@pytest.mark.parametrize("make", [classes, labels, numbers])
def test_every_score_has_an_interval_around_it(make):
    found = make()
    values, bounds = score_values(found), score_intervals(found, 200)
    assert values.keys() == bounds.keys()
    for name, (low, high) in bounds.items():
        assert low <= values[name] <= high, name
        assert high - low > 0
    assert bounds == score_intervals(found, 200)  # seeded
    assert set(values) <= {s.name for s in scores_of(found.target, found.classes, True)}


def test_intervals_are_those_of_pictures_drawn_one_by_one():
    found, generator = classes(), np.random.default_rng(3)
    truths, predicted = found.truths.numpy(), found.predicted.numpy()
    drawn = [generator.integers(200, size=200) for _ in range(1000)]
    f1 = [metrics.f1_score(truths[d], predicted[d], average="macro") for d in drawn[:300]]
    assert score_intervals(found)["f1"] == pytest.approx(np.quantile(f1, (0.025, 0.975)), abs=0.02)
    accuracy = [(truths == predicted)[d].mean() for d in drawn]
    assert score_intervals(found)["acc"] == pytest.approx(np.quantile(accuracy, (0.025, 0.975)), abs=0.01)


def test_an_honest_model_has_an_interval_down_to_no_calibration_error():
    """Sampling alone makes a calibration error, more of it in resamples, and percentiles would show that."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(300, 4, generator=generator)
    truths = torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]
    found = Predictions("class", outputs, truths)
    low, high = score_intervals(found)["ece_raw"]
    assert 0 <= low < 0.01 < high
    assert low < score_values(found)["ece_raw"]


def test_without_what_a_metric_needs_there_is_no_value():
    found = Predictions("class", torch.full((3, 3), float("nan")), torch.tensor([0, 1, 2]))
    assert set(score_values(found)) <= {"acc", "f1", "ece_raw"}
    nothing = Predictions("classes", torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.long))
    assert "map" not in score_values(nothing)
    assert "map" not in score_intervals(nothing, 20)
    assert intervals(lambda c: c[:, :1], 1, 5).shape == (1, 2)
