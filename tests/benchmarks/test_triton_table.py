"""Triton's kernels, compiled ahead: none spills, and the table that is kept is of today's kernels."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import triton_table


def kept_rows() -> list[dict[str, object]]:
    return json.loads((triton_table.RESULTS / "triton_table.json").read_text(encoding="utf-8"))["kernels"]


def test_the_table_has_every_kernel_and_none_spills() -> None:
    rows = kept_rows()
    for target in triton_table.TARGETS:
        names = [kernel.name for kernel in triton_table.kernels(target)]
        assert names == [row["kernel"] for row in rows if row["target"] == target]
        assert len(set(names)) == len(names)
    assert all(row["spilled"] == 0 and row["programs"] for row in rows)
    assert (triton_table.RESULTS / "triton_table.md").read_text().count("\n| ") == len(rows) + 2


def test_the_table_warns_of_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"registers": 255, "spilled": 8, "shared": 1024, "programs": 1}
    monkeypatch.setattr(triton_table, "built", lambda kernel, target: found)
    assert triton_table.main(["--out", str(tmp_path)]) == 0
    assert triton_table.main(["--out", str(tmp_path), "--check"]) == 1


@pytest.mark.slow
def test_no_kernel_spills(tmp_path: Path) -> None:
    assert triton_table.main(["--out", str(tmp_path), "--check"]) == 0
