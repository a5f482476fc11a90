"""Predictions as rows of a CSV, JSON or Parquet file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.spreadsheet import safe_cell, safe_path

Row = Mapping[str, Any]  # by column: words, numbers, lists of them; None where there is nothing
PATH = "path"  # the column of the pictures' names
SEPARATOR = ";"  # between the items of a list in a CSV's cell


def problems_of_file(name: str, path: Path, suffixes: Sequence[str], overwrite: bool) -> list[str]:
    """Why a file cannot be written, one line each.

    Args:
        name: of the option.
    """
    if path.suffix.lower() not in suffixes:
        return [f"{name}={path}: give a file that ends in {' or '.join(suffixes)}."]
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        return [f"{name}={path}: needs pyarrow: pip install 'lora-lightning[stream]'"]
    if path.is_dir():
        return [f"{name}={path}: is a folder; give a file."]
    if path.exists() and not overwrite:
        return [f"{name}={path} is there already: give another name, or overwrite=true."]
    if not path.absolute().parent.is_dir():
        return [f"{name}={path}: there is no folder {path.parent}: create it first."]
    return []


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write rows, whole or not at all, in the form that the file's suffix says.

    In a CSV a list is one cell with ";" between its items, and nothing an empty one; what a spreadsheet would
    take for a formula has an apostrophe before it, a path "./".

    Args:
        columns: their order; a row may lack some.
    """
    write = WRITERS[path.suffix.lower()]
    write_whole(path, lambda temporary: write(temporary, columns, rows))


def _csv(path: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(safe_cell, columns))
        for row in rows:
            writer.writerow([
                safe_path(row[name]) if name == PATH and name in row else _cell(row.get(name))
                for name in columns
            ])  # fmt: skip


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return safe_cell(SEPARATOR.join(map(_plain_cell, value)))
    return safe_cell(value) if isinstance(value, str) else _plain_cell(value)


def _plain_cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def _json(path: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    kept = [{name: row[name] for name in columns if row.get(name) is not None} for row in rows]
    Path(path).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _parquet(path: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    parquet.write_table(table, path)


WRITERS: dict[str, Callable[[str, Sequence[str], Sequence[Row]], None]] = {
    ".csv": _csv,
    ".json": _json,
    ".parquet": _parquet,
}
