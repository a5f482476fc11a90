"""Pictures listed in a table, CSV, TSV or Parquet: path, label, and perhaps split, weight and others."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_lightning.data.decoding import SUFFIXES
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.picture_rows import PART_NAMES, TABLES, PictureRow, text_of
from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.tables import truncate_list

COLUMNS = {  # name -> what other tools call it, first come first
    "path": (
        "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "image_id",
    ),
    "label": ("labels", "class", "classes", "category", "target", "tags", "y"),
    "split": ("subset", "part", "partition", "set"),
    "weight": ("sample_weight",),
}  # fmt: skip
SEPARATORS = ("|", ";", ",")


class Table(NamedTuple):
    """A table as it was read: the names of its columns, and its rows as mappings, with their numbers."""

    file: Path
    columns: list[str]
    rows: list[tuple[int, Mapping[str, Any]]]


def read_table(path: str | Path) -> Table:
    """The rows of a table; the first one of a file is 2, as a spreadsheet counts behind the header.

    Raises:
        MissingFileError: there is no such file.
        DataError: it cannot be read, or has no rows.
    """
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        near = [p.name for p in file.parent.glob("*") if p.suffix.lower() in TABLES]
        raise MissingFileError(
            f"table={path}: there is no such file.{did_you_mean(file.name, near)} Give a CSV, TSV or Parquet "
            "file with the columns path and label."
        )
    columns, rows = _parquet(file) if file.suffix.lower() == ".parquet" else _text(file)
    if not rows:
        raise DataError(f"table={path}: has no rows: give one with a picture a row.")
    return Table(file, columns, rows)


def _parquet(file: Path) -> tuple[list[str], list[tuple[int, Mapping[str, Any]]]]:
    with loading("pyarrow", "stream"):
        import pyarrow
        import pyarrow.parquet as parquet
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"table={file}: cannot be read as Parquet ({_brief(error)}). Write it anew."
        ) from None
    return list(table.column_names), list(enumerate(table.to_pylist(), 2))


def _text(file: Path) -> tuple[list[str], list[tuple[int, Mapping[str, Any]]]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"table={file}: is not UTF-8 text ({_brief(error)}); save it as CSV in UTF-8."
        ) from None
    head = text.partition("\n")[0]
    tabs = file.suffix.lower() == ".tsv" or ("\t" in head and "," not in head)
    delimiter = "\t" if tabs else ";" if ";" in head and "," not in head else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return list(reader.fieldnames or []), [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataError(f"table={file}: cannot be read ({error}), line {reader.line_num}: mend it.") from None


def column_names(table: Table, label: str | None) -> dict[str, str]:
    """Our name of a column -> its name in the table.

    Args:
        label: the column of the labels; None looks for one.

    Raises:
        ConfigError: there is no column of that name, of paths or of labels.
    """
    known = {str(c).strip().lower(): c for c in table.columns}
    found = {
        name: known[alias]
        for name, aliases in COLUMNS.items()
        for alias in [next((a for a in (name, *aliases) if a in known), None)]
        if alias is not None
    }
    listed = ", ".join(map(str, table.columns))
    problems = []
    if label is not None:
        if label.strip().lower() in known:
            found["label"] = known[label.strip().lower()]
        else:
            near = did_you_mean(label, table.columns)
            problems.append(f"label={label}: {table.file.name} has no such column.{near} Columns: {listed}.")
    elif "label" not in found:
        near = did_you_mean("label", table.columns)
        problems.append(
            f"table={table.file}: has no column label.{near} Columns: {listed}; give data.label=COLUMN."
        )
    if "path" not in found:
        near = did_you_mean("path", table.columns)
        problems.append(
            f"table={table.file}: has no column path.{near} Columns: {listed}; name one of them so."
        )
    if problems:
        raise ConfigError(problems)
    return found


def table_rows(
    table: Table, names: Mapping[str, str], root: Path, group: str | None, findings: Findings
) -> list[PictureRow]:
    """The rows whose file is there; labels are texts as they are written.

    Args:
        names: as `column_names` gives them.
        root: the folder to which paths are relative.
        group: a column, of which no two parts may share a value; None for none.
    """
    rows = []
    for number, record in table.rows:
        where = f"{table.file.name}, row {number}"
        if any(map(str.strip, record.get(None) or ())):  # type: ignore[call-overload]  # where csv puts them
            told = f"{where}: {', '.join(record[None])}"  # type: ignore[index]  # where csv puts more cells
            findings.add("row with more cells than the header (quote what holds a comma)", told, "left out")
            continue
        written = _cell(record, names, "path")
        if not written:
            findings.add("row without a path", where, "left out")
            continue
        found = _file(written, root)
        if found is None:
            findings.add("row whose file is missing", f"{where}: {written}", "left out")
            continue
        file, name = found
        part = _cell(record, names, "split").lower()
        if part and part not in PART_NAMES:
            findings.add("row of an unknown split", f"{where}: {part}", "left out")
            continue
        weight = _weight(_cell(record, names, "weight"))
        if weight is None:
            findings.add("row whose weight is no number of at least 0", where, "left out")
            continue
        label = _cell(record, names, "label")
        of = str(record.get(group) or "").strip() if group else ""
        rows.append(PictureRow(str(file), text_of(name), (label,), PART_NAMES.get(part, ""), of, weight))
    if not rows:
        raise DataError(
            f"table={table.file}: no row has a file that is there, looked for in {root}: give "
            f"data.root=FOLDER, where they lie.\n\n{findings.table()}"
        )
    return rows


def _cell(record: Mapping[str, Any], names: Mapping[str, str], name: str) -> str:
    value = record.get(names[name]) if name in names else None
    if isinstance(value, (list, tuple)):  # of Parquet
        return SEPARATORS[0].join(map(str, value))
    if isinstance(value, float) and math.isnan(value):  # a gap, too
        return ""
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers beside gaps
        value = int(value)
    return "" if value is None else str(value).strip()


def _file(written: str, root: Path) -> tuple[Path, str] | None:
    """Where a path leads, and how it should have been written: as it stands, with the slashes of another
    system, or with a suffix."""
    for form in (written, written.replace("\\", "/")):
        for suffix in ("", *SUFFIXES) if Path(form).suffix.lower() not in SUFFIXES else ("",):
            path = root / Path(form + suffix).expanduser()
            if path.is_file():
                return path, form + suffix
    return None


def _weight(written: str) -> float | None:
    if not written:
        return 1.0
    try:
        weight = float(written)
    except ValueError:
        return None
    return weight if math.isfinite(weight) and weight >= 0 else None


def number_of(label: str) -> float | None:
    """A label as a finite number, None where it is none."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def ambiguity(rows: Sequence[PictureRow], table: Path) -> str | None:
    """Why the labels of a table do not tell by themselves whether they are classes; None where they do.

    Numbers may be classes or quantities; names with `|` in them one class or several.
    """
    labels = [label for row in rows for label in row.labels if label]
    some = truncate_list(list(dict.fromkeys(labels)))
    if labels and all(number_of(label) is not None for label in labels):
        return (
            f"target=null: the labels of {table.name} are numbers ({some}). Give data.target=class where "
            "each is the name of a class, data.target=number where they are quantities to be predicted."
        )
    for separator in SEPARATORS:
        several = [label for label in labels if separator in label]
        alone = {label for label in labels if separator not in label}
        # A comma may stand within a name; where it does not, its parts are classes of other pictures, too.
        apart = separator != "," or all(alone.issuperset(_parts(label, separator)) for label in several)
        if several and apart:
            return (
                f"target=null: labels of {table.name} hold {separator!r} ({several[0]}). Give "
                "data.target=classes to take them apart, a picture then has several classes; "
                "data.target=class where each is one class's name."
            )
    return None


def _parts(label: str, separator: str) -> list[str]:
    return [part.strip() for part in label.split(separator) if part.strip()]


def separated(labels: Sequence[str], separator: str | None) -> list[tuple[str, ...]]:
    """Labels of several classes taken apart.

    Args:
        separator: between them; None takes the first of SEPARATORS that occurs.
    """
    if separator is None:
        separator = next((s for s in SEPARATORS if any(s in label for label in labels)), SEPARATORS[0])
    return [tuple(dict.fromkeys(_parts(label, separator))) for label in labels]


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
