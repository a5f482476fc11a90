"""Utterances as rows: read from any manifest (CSV, TSV, JSONL), filtered by accent, split by speaker."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean

COLUMNS = {  # name -> what other tools call it, NeMo, Common Voice and Kaldi's converters among them
    "path": ("audio", "audio_filepath", "audio_path", "file", "filename", "wav"),
    "text": ("sentence", "transcript", "transcription"),
    "id": ("utterance", "utt_id", "uid"),
    "accent": ("accents",),
    "speaker": ("client_id", "speaker_id", "spk"),
    "start": ("offset",),
    "end": (),
    "duration": (),
    "split": ("subset",),
}
FORMATS = (".csv", ".tsv", ".jsonl", ".json")
PARTS = ("train", "val", "test")
PART_NAMES = {
    "train": "train", "training": "train", "dev": "val", "val": "val", "valid": "val", "validation": "val",
    "test": "test",
}  # fmt: skip
SPLIT_BY = ("speaker", "text", "utterance")
SHOWN = 5  # problems of one kind that are named


@dataclass(frozen=True)
class Row:
    """One utterance. `start` and `end` are seconds in the file, None its ends; `text` is as it was written;
    `split` is the part that the corpus itself puts it into, or empty."""

    path: str
    text: str
    id: str
    accent: str = ""
    speaker: str = ""
    start: float | None = None
    end: float | None = None
    split: str = ""


def read_manifest(path: str | Path) -> list[Row]:
    """The rows of a manifest: a CSV or TSV file with a header, or JSONL with one object a line.

    Columns: path (relative to the manifest's folder, or absolute) and text; optional id, accent, speaker,
    start and end (or duration) in seconds, split (train, dev or val, test). Other columns are ignored; the
    names of NeMo's manifests and of Common Voice's tables are understood, in upper or lower case.

    Raises:
        MissingFileError: there is no such file.
        ConfigError: no rows, missing columns, numbers that are none; every problem at once.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in FORMATS:
        raise ConfigError([f"manifest={path}: give a file that ends in {', '.join(FORMATS)}."])
    if not file.is_file():
        near = [p.name for p in file.parent.glob("*") if p.suffix in FORMATS] if file.parent.is_dir() else []
        raise MissingFileError(
            f"manifest={path}: there is no file {file.absolute()}.{did_you_mean(file.name, near)}"
            " Give a CSV, TSV or JSONL file with the columns path and text."
        )
    try:
        records = _records(file)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ConfigError([
            f"manifest={path}: cannot be read as UTF-8 {file.suffix[1:]} ({error}): save it anew as that."
        ]) from error  # fmt: skip
    return _rows(records, file)


def _records(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number and fields of each row."""
    lines = io.StringIO(file.read_text(encoding="utf-8-sig"))  # its lines end at line feeds alone
    if file.suffix.lower() in (".jsonl", ".json"):
        return [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
    if file.suffix.lower() == ".tsv":  # quotes mean nothing in the tables of Common Voice
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines)
    return [(reader.line_num, fields) for fields in reader]


def _rows(records: Sequence[tuple[int, Mapping[str, Any]]], file: Path) -> list[Row]:
    if not records:
        raise ConfigError([f"manifest={file}: has no rows: give one with an utterance a row."])
    first = records[0][1]
    names = _column_names(first)
    if missing := [n for n in ("path", "text") if n not in names]:
        columns = [str(c) for c in first]
        raise ConfigError([
            f"manifest={file}: has no column {n}.{did_you_mean(n, columns)} Columns: {', '.join(columns)}."
            for n in missing
        ])  # fmt: skip
    rows, problems = [], []
    for line, record in records:
        fields = {name: record.get(column) for name, column in names.items()}
        try:
            rows.append(_row(fields, file.parent, f"{file.stem}-{line}"))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ConfigError([f"manifest={file}: {p}" for p in [*problems[:SHOWN], *more]])
    return rows


def _column_names(first: Mapping[str, Any]) -> dict[str, str]:
    """Our name of a column -> its name in the file."""
    given = {str(column).strip().lower(): column for column in first}
    return {
        name: given[alias]
        for name, aliases in COLUMNS.items()
        for alias in [next((a for a in (name, *aliases) if a in given), None)]
        if alias is not None
    }


def _row(fields: Mapping[str, Any], folder: Path, default_id: str) -> Row:
    path = str(fields["path"] or "").strip()
    if not path:
        raise ValueError("path is empty")
    start, end, duration = (_seconds(name, fields.get(name)) for name in ("start", "end", "duration"))
    if end is None and duration is not None and start is not None:
        end = start + duration
    if end is not None and end <= (start or 0):
        raise ValueError(f"end={end:g} is not after start={start or 0:g}")
    split = str(fields.get("split") or "").strip().lower()
    if split and split not in PART_NAMES:
        raise ValueError(f"split={split!r} is none of {', '.join(PART_NAMES)}")
    return Row(
        str(folder / Path(path).expanduser()),
        str(fields["text"] or ""),
        str(fields.get("id") or default_id),
        str(fields.get("accent") or "").strip(),
        str(fields.get("speaker") or "").strip(),
        start,
        end,
        PART_NAMES.get(split, ""),
    )


def _seconds(name: str, value: Any) -> float | None:
    if value is None or str(value).strip() == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name}={value!r} is no number of seconds")
    return seconds


def with_accent(rows: Iterable[Row], accents: Sequence[str]) -> list[Row]:
    """The rows whose accent is one of these, upper or lower case; Common Voice's `a,b` and `a|b` is both.

    Raises:
        ConfigError: an accent that no row has, with those that there are.
    """
    rows = list(rows)
    counts = Counter(name for row in rows for name in _accents(row))
    wanted = [a.strip().lower() for a in accents]
    spelled = {name.lower(): name for name in counts}
    if absent := [a for a, w in zip(accents, wanted, strict=True) if w not in spelled]:
        known = ", ".join(f"{n} ({c})" for n, c in counts.most_common(30)) or "none: there is no such column"
        raise ConfigError([
            f"accent={a!r}: no utterance has it.{did_you_mean(a, counts)} Accents: {known}." for a in absent
        ])  # fmt: skip
    return [row for row in rows if {n.lower() for n in _accents(row)} & set(wanted)]


def _accents(row: Row) -> set[str]:
    """The whole field, which may hold a comma of its own, and its parts."""
    parts = row.accent.replace("|", ",").split(",")
    return {name for name in (row.accent, *(p.strip() for p in parts)) if name}


def split_rows(
    rows: Sequence[Row], by: Sequence[str] = ("speaker",), val: float = 0.1, test: float = 0.1, seed: int = 0
) -> tuple[dict[str, list[Row]], int]:
    """Rows for training, validation and test that share no speaker (or no text, or neither).

    The corpus's own parts are kept where every row has one. Otherwise the speakers, in an order drawn from
    `seed`, go to the test and validation parts until these have their shares of the rows. By speaker and
    text, a row whose speaker and text belong to different parts is left out.

    Returns:
        Rows by part, and how many were left out.

    Raises:
        ConfigError: too few speakers or texts for three parts, or a part that is empty.
    """
    rows = list(rows)
    if all(row.split for row in rows):
        parts = {part: [r for r in rows if r.split == part] for part in PARTS}
        return _filled(parts, "the corpus's own split leaves"), 0
    kept, part_of = rows, dict[Row, str]()
    for field in by:
        places = _assigned(kept, part_of, field, val, test, seed)
        kept = [row for row in kept if part_of.get(row, places[_key(row, field)]) == places[_key(row, field)]]
        part_of = {row: places[_key(row, field)] for row in kept}
    parts = {part: [row for row in kept if part_of[row] == part] for part in PARTS}
    return _filled(parts, f"split_by={','.join(by)} leaves"), len(rows) - len(kept)


def _filled(parts: dict[str, list[Row]], what: str) -> dict[str, list[Row]]:
    if empty := [part for part, rows in parts.items() if not rows]:
        raise ConfigError([
            f"{what} no utterance for {', '.join(empty)}: give more, or another split; "
            "data.test_share=1 where they are only tested on."
        ])  # fmt: skip
    return parts


def _key(row: Row, field: str) -> str:
    return {"speaker": row.speaker, "text": row.text.lower(), "utterance": row.id}[field]


def _assigned(
    rows: Sequence[Row], part_of: Mapping[Row, str], field: str, val: float, test: float, seed: int
) -> dict[str, str]:
    """Value of a field -> part. A value whose rows are all in one part already stays there; the others are
    drawn, until test and validation have their shares of the rows."""
    counts: Counter[str] = Counter()
    seen = defaultdict(set)
    for row in rows:
        counts[_key(row, field)] += 1
        seen[_key(row, field)].add(part_of.get(row))
    if len(counts) < len(PARTS):
        others = [f for f in SPLIT_BY if f != field and len({_key(r, f) for r in rows}) >= len(PARTS)]
        remedy = f" Give split_by={others[0]}." if others else " Give more rows."
        named = "no speakers" if list(counts) == [""] else f"{len(counts)} different"
        raise ConfigError([
            f"split_by={field}: the rows name {named}; three parts need at least 3.{remedy}"
        ])  # fmt: skip
    places = {value: parts.copy().pop() or "" for value, parts in seen.items() if len(parts) == 1}
    free = sorted(value for value in counts if not places.get(value))
    random.Random(seed).shuffle(free)
    total = sum(counts[value] for value in free)
    for part, share, later in (("test", test, 2), ("val", val, 1)):
        filled = 0
        while filled < share * total and len(free) > later:
            value = free.pop()
            places[value] = part
            filled += counts[value]
    return {**places, **dict.fromkeys(free, "train")}
