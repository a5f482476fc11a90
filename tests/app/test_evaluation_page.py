"""The page that `evaluate` prints."""

from lora_lightning.app.evaluate import _cells


def test_a_score_that_a_class_does_not_have_is_a_dash():
    row = {"class": "cat", "precision": None, "precision_low": None, "precision_high": None}
    known = {"recall": 0.5, "recall_low": 0.25, "recall_high": 0.75}
    assert _cells(row | known) == {"class": "cat", "precision": "–", "recall": "0.500 (0.250–0.750)"}
