"""What data decide is decided by the first process, and alike on every one."""

import pytest
import run_decided
import torch
from processes import run, same


@pytest.mark.slow
def test_every_process_begins_as_the_first_has_decided(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir(), one.mkdir()
    run("run_decided.py", two)
    begun, ended = ([torch.load(two / f"{when}{i}.pt") for i in range(2)] for when in ("begun", "ended"))
    assert same(begun) and same(ended)
    run_decided.main(one, processes=1)
    alone = torch.load(one / "begun0.pt")
    assert len(set(alone["ranks"].tolist())) > 1 and begun[0].keys() == alone.keys()
    assert all(torch.equal(begun[0][name], value) for name, value in alone.items())
    assert not all(torch.equal(ended[0][name], value) for name, value in alone.items())
