"""A stream over two processes of two workers: every picture once an epoch, and the same when resumed."""

import json
from collections import Counter
from pathlib import Path

import pytest
from processes import run

from tests.data.shards import write_tars


def seen(folder: Path) -> list[list[list[int]]]:
    return [json.loads((folder / f"seen{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_of_two_workers_resume_in_the_middle_of_an_epoch(tmp_path):
    """60 pictures to train on, 10 steps of 3 a process an epoch; resumed after step 4 and after step 13."""
    pattern = write_tars(tmp_path / "s", [6] * 11)
    whole = tmp_path / "whole"
    for folder in (whole, tmp_path / "4", tmp_path / "13"):
        folder.mkdir()
    run("run_stream.py", 2, pattern, whole, 20)
    straight = seen(whole)
    assert [len(batches) for batches in straight] == [20, 20]
    for epoch in range(2):
        shown = [n for batches in straight for b in batches[10 * epoch : 10 * epoch + 10] for n in b]
        assert set(Counter(shown).values()) == {1} and len(shown) == 60
    assert straight[0][:10] != straight[0][10:]
    for step in (4, 13):
        run("run_stream.py", 2, pattern, tmp_path / str(step), 20, whole / f"{step}.ckpt")
        assert seen(tmp_path / str(step)) == [batches[step:] for batches in straight]
