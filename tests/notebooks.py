"""The notebooks of `examples/`, executed: `python -m tests.notebooks` runs each in an empty folder and fails
where a cell does; `--write` keeps what they print and show."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = tuple(sorted(EXAMPLES.glob("*.ipynb")))
SECONDS = 900  # of a cell at most, on a machine that has much else to do


def executed(notebook: Path) -> Any:
    """A notebook with the outputs of a run in an empty folder, cleaned.

    Raises:
        CellExecutionError: of the first cell that fails.
    """
    content = nbformat.read(notebook, as_version=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            content, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute(env=environment)
    return cleaned(content)


def cleaned(content: Any) -> Any:
    """Without what differs from run to run: warnings, progress, which says seconds, the times of cells."""
    for cell in content.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if not _passing(one)]
            for one in cell.outputs:
                if "image/jpeg" in one.get("data", {}):  # PIL's picture comes twice
                    one.data.pop("image/png", None)
    content.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return content


def _passing(output: Any) -> bool:
    return output.get("name") == "stderr" or bool(output.get("metadata", {}).get("progress"))


def texts(content: Any) -> str:
    """All that the cells have printed."""
    return "".join(
        one.text
        for cell in content.cells
        if cell.cell_type == "code"
        for one in cell.outputs
        if one.output_type == "stream"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the outputs")
    write = parser.parse_args().write
    for notebook in NOTEBOOKS:
        content = executed(notebook)
        print(f"{notebook.name}:\n{texts(content)}")
        if write:
            nbformat.write(content, notebook)


if __name__ == "__main__":
    main()
