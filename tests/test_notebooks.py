"""The notebooks of the examples: sound files, public names alone, outputs that say nothing of this machine;
executed in the slow run."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.notebooks import NOTEBOOKS, executed, texts

LARGEST = 100_000  # bytes of a file
FOREIGN = re.compile(
    r"/(root|home|tmp|Users|usr|opt|work)/|[A-Z]:\\|samples/s|\d:\d\d\b"
)  # of a machine and a run
INSTALLS = 'find_spec("lora_lightning") is None'


def sources(notebook: Path) -> list[str]:
    """The code of its cells, as Python: what a notebook's magic line does stands as `pass`."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return [re.sub(r"^( *)%.*$", r"\1pass", text, flags=re.M) for text in code]


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each module of ours, and the name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lora_lightning"):
            yield from ((str(node.module), alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ll":
            yield "lora_lightning", node.attr


def test_there_are_two() -> None:
    assert [notebook.name for notebook in NOTEBOOKS] == ["accent.ipynb", "own_pictures.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_sound(notebook: Path) -> None:
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    assert notebook.stat().st_size < LARGEST
    assert not FOREIGN.findall(texts(content))
    assert not FOREIGN.findall("\n".join(cell.source for cell in content.cells))
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # run once, from the top
    assert not any(one.output_type == "error" for cell in code for one in cell.outputs)
    assert any("image/jpeg" in one.get("data", {}) for cell in code for one in cell.outputs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_its_cells_are_python_of_public_names(notebook: Path) -> None:
    first, *_ = cells = sources(notebook)
    assert INSTALLS in first
    for number, text in enumerate(cells):
        tree = ast.parse(text, f"{notebook.name}, cell {number}")
        for module, name in imported(tree):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
            assert not any(part.startswith("_") for part in [*module.split("."), name])
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), node.attr


@pytest.mark.slow
def test_own_pictures_runs() -> None:
    printed = texts(executed(NOTEBOOKS[1]))
    before, after = map(int, re.search(r"(\d+) % before, (\d+) % now", printed).groups())
    assert after > before + 10
    off = int(re.search(r"adapter off: (\d+) %", printed)[1])
    assert off > 95


@pytest.mark.slow
def test_an_accent_runs() -> None:
    printed = texts(executed(NOTEBOOKS[0]))
    (scottish, american), (on, worse), off = (
        tuple(map(int, re.findall(r"(\d+) %", line)))
        for line in re.findall(r"^word errors.*$", printed, re.M)
    )
    assert on < scottish - 15
    assert off == (scottish, american)
    assert worse > american


@pytest.mark.slow
def test_progress_is_one_output_and_that_of_a_command_lines() -> None:
    """A real kernel: work in its own process, and in that of a command, which is given a terminal."""
    work = "import time\nfrom lora_lightning.utils.progress import working\n"
    work += "for _ in working(range(25), 'reading', 'rows'):\n    time.sleep(0.1)"
    milestones = "from lora_lightning.utils.progress import Bar\nimport sys\nprint(sys.stderr.isatty())\n"
    milestones += "with Bar('LoRA', 2, stays=True) as bar:\n    bar.advance(2)\n    bar.milestone()"
    command = f'import sys\ncode = {milestones!r}\n!{{sys.executable}} -c "$code"'
    content = new_notebook(cells=[new_code_cell(work), new_code_cell(command)])
    NotebookClient(content, timeout=300, kernel_name="python3").execute()
    (bar,), outputs = content.cells[0].outputs, content.cells[1].outputs
    assert bar.metadata["progress"]
    assert bar.data["text/plain"].startswith("reading             25/25 rows")
    told = "".join(one.text for one in outputs)
    assert re.fullmatch(r"True\s+LoRA +2/2.*\s+", told)
    assert "\x1b" not in told
