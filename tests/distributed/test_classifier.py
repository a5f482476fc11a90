"""The scores and the temperature of two processes are those of one, though one picture is seen by both."""

import json

import pytest
from processes import run
from run_classification import PICTURES, evaluate


@pytest.mark.slow
def test_two_processes_score_and_calibrate_as_one(tmp_path):
    alone = json.loads(json.dumps(evaluate(1)))
    run("run_classification.py", 2, tmp_path / "scores.json")
    together = json.loads((tmp_path / "scores.json").read_text())
    assert len(alone["truths"]) == PICTURES
    assert {"test/acc", "test/top5", "test/f1", "test/ece", "test/ece_raw"} < alone.keys()
    assert together == alone
