"""The benchmark as a whole, on the smallest of its models, and what its limits say."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import models, on_paper, paper_tables
from benchmarks.paper_host import graph_of, host_row
from benchmarks.paper_limits import checked, limits_of


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, models.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A workload of its own, and a folder for the results."""
    batch = lambda size: (torch.randn(size, 32), torch.randint(0, models.CLASSES, (size,)))  # noqa: E731
    workload = models.Workload(Tiny, batch, 64, "", r"body\.[02]", "head", peer=False)
    monkeypatch.setitem(models.WORKLOADS, "tiny", workload)
    monkeypatch.setattr(on_paper, "RESULTS", tmp_path)
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path)
    return tmp_path


def test_every_way_is_counted_and_written(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["on_paper", "--model", "tiny", "--batch", "64", "--host"])
    assert on_paper.main() == 0
    result = json.loads((tiny / "on_paper_tiny_64.json").read_text())
    assert set(result["ways"]) >= {"floor", "full", "ours", "keep_inputs", "reference"}
    floor, full, ours = (result["ways"][way] for way in ("floor", "full", "ours"))
    assert floor["ratio"] == 1 and full["calls"] > floor["calls"] and full["tflop"] > floor["tflop"]
    assert ours["own_calls"] > floor["own_calls"] == 0
    assert full["saved_gib"] * 2**30 == pytest.approx(2 * 64 * (32 + 64 + 64 + 32) + 4 * 64 * 11, rel=0.2)
    page = (tiny / "on_paper.md").read_text()
    overview = next(line for line in page.splitlines() if line.startswith("| tiny, batch 64, bf16-true"))
    assert f"| {full['ratio']:.2f}; {full['calls']}; " in overview
    assert "## tiny, batch 64, bf16-true, rank 8, H100" in page and "| ours |" in page
    assert "no limits are set" in capsys.readouterr().out


def test_floor_of_a_workload_by_hand(tiny: Path) -> None:
    """Two products forward, two back; the head's three more, and the loss."""
    options = Namespace(model="tiny", batch=64, device="H100", precision="bf16-true", rank=8, dropout=0.0)
    row = on_paper.counted("floor", Namespace(**vars(options), dora=False, host=False))
    products = 2 * 64 * (2 * 32 * 64 + 32 * models.CLASSES)  # of a forward
    assert row["tflop"] * 1e12 == 2 * products + 2 * 64 * 32 * models.CLASSES


def run(**ways: dict[str, float]) -> dict[str, Any]:
    settings = {"model": "vit_base", "batch": 128, "device": "H100", "precision": "bf16-true", "rank": 8}
    return {**settings, "dropout": 0.0, "dora": False, "ways": ways}


def test_limits() -> None:
    floor = {"ms": 10.0, "calls": 100, "saved_gib": 1.0}
    good = {"ms": 12.0, "calls": 600, "saved_gib": 1.05}
    text, failed = checked(run(floor=floor, ours=good, keep_inputs=good, fused=good))
    assert not failed and "EXCEEDED" not in text
    text, failed = checked(run(floor=floor, ours={**good, "calls": 701}, keep_inputs=good, fused=good))
    assert failed and text.count("EXCEEDED") == 1
    assert limits_of({**run(), "rank": 16}) == []
    assert limits_of({**run(), "dropout": 0.1})[1].to == "peft"


def test_what_the_host_does() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x + x

        @staticmethod
        def backward(ctx: Any, dY: torch.Tensor) -> torch.Tensor:
            return dY + dY

    x = torch.empty(3, device="meta", requires_grad=True)
    row = host_row(lambda: Twice.apply(x.exp()).sum())
    assert (row["nodes"], row["python_nodes"]) == (4, 1)  # exp, Twice, sum, and x's own
    assert len(graph_of((x * x).sum())) == 3
    assert row["own_calls"] == 0 and row["torch_calls"] > 0
