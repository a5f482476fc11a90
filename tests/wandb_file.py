"""What an offline run of W&B holds, read back from its own file by W&B's own messages."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class StoredRun:
    """One run, as it would be uploaded.

    Attributes:
        about: id, name, group, job_type, host, project.
        config, summary: by name, whose levels are parted by /.
        history: a row for each step.
        artifacts: each with name, type, aliases, metadata, files, and whether the run uses it.
        environment: what is said of machine and program.
        hidden: beginnings of the names of metrics of which no charts are drawn.
        kinds: of all records.
    """

    about: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    environment: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    exit: int | None = None

    def last(self) -> dict[str, Any]:
        """The last value of each name in the history."""
        return {name: value for row in self.history for name, value in row.items()}

    def curve(self, name: str) -> list[Any]:
        """All of its values in the history."""
        return [row[name] for row in self.history if name in row]


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB, each piece with its
    checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, at, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece = data[at + 7 : at + 7 + length]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        record, at = record + piece, at + 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_wandb(file: Path) -> StoredRun:
    """What a run's own file holds. W&B has no reader of it in Python any more, but its messages."""
    from wandb.proto import wandb_internal_pb2

    found = StoredRun()
    for data in wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.kinds.add(kind)
        if kind == "run":
            run = record.run
            found.tags += list(run.tags)
            found.about |= {
                "id": run.run_id, "name": run.display_name, "group": run.run_group, "host": run.host,
                "job_type": run.job_type, "project": run.project,
            }  # fmt: skip
            found.config |= _items(run.config.update)
        elif kind == "config":
            found.config |= _items(record.config.update)
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "artifact":
            found.artifacts.append(_artifact(record.artifact))
        elif kind == "environment":
            found.environment.append(record.environment)
        elif kind == "files":
            found.files += [one.path for one in record.files.files]
        elif kind == "metric" and record.metric.options.hidden:
            found.hidden.append(record.metric.glob_name or record.metric.name)
        elif kind == "exit":
            found.exit = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _artifact(artifact: Any) -> dict[str, Any]:
    return {
        "name": artifact.name,
        "type": artifact.type,
        "aliases": set(artifact.aliases),
        "metadata": json.loads(artifact.metadata or "{}"),
        "files": {entry.path: entry.local_path for entry in artifact.manifest.contents},
        "used": artifact.use_after_commit,
    }
