"""The scores of two processes are those of one, though one image is seen by both."""

import json

import pytest
from processes import run
from run_detection import evaluate


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path):
    alone = evaluate(1)
    run("run_detection.py", 2, tmp_path / "scores.json")
    together = json.loads((tmp_path / "scores.json").read_text())
    assert together.keys() == alone.keys()
    assert {"val/map", "test/map_small", "test/map/3"} <= alone.keys()
    assert 0.1 < alone["test/map"] < 0.9
    for name, score in alone.items():
        assert together[name] == pytest.approx(score, abs=1e-9), name
