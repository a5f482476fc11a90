"""Parquet files of pictures, in Hugging Face's layout or plain: read a group of rows at a time."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.stream_sources import OpenFiles, open_shard
from lora_lightning.data.stream_tar import Label, as_label
from lora_lightning.errors import did_you_mean
from lora_lightning.utils.libraries import loading

BYTES = "bytes"  # of a picture, in Hugging Face's struct of bytes and path


class ParquetShards:
    """The pictures of Parquet files and their labels, by row group and row.

    Hugging Face's `datasets` writes a picture as a struct of `bytes` and `path` and keeps the names of the
    classes in the metadata; a plain column of bytes will do as well.

    Args:
        names: the files.
        image, label: the columns.
        budget: bytes that the row groups of one process may take.
        window: row groups that are mixed; no more are held, and fewer where the budget is less.
        findings: takes in what is wrong; files that cannot be read are left out.

    Attributes:
        names, counts: of each row group.
        class_names: of the metadata, if they are there.

    Raises:
        DataError: a column that is not there, or of another kind.
    """

    def __init__(
        self, names: Sequence[str], image: str, label: str, window: int, budget: int, findings: Findings
    ) -> None:
        self.image, self.label = image, label
        self.names: list[str] = []
        self.counts: list[int] = []
        self.class_names: list[str] | None = None
        self.labels: set[Any] = set()
        self._groups: list[tuple[str, int]] = []
        sizes = [size for name in names for size in self._add(name, findings)]
        largest = max(sizes, default=1)
        self.window = max(1, min(window, budget // max(1, largest)))
        self._files = OpenFiles(self.window + 1)
        self._held: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._process = os.getpid()

    def _add(self, name: str, findings: Findings) -> list[int]:
        """The bytes of a file's row groups."""
        with loading("pyarrow", "stream"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        try:
            with open_shard(name) as opened, pq.ParquetFile(opened) as file:
                schema, meta = file.schema_arrow, file.metadata
                self._check(name, schema)
                named = class_names_of(schema.metadata, self.label)
                if named is None and self.class_names is None:
                    column = file.read(columns=[self.label]).column(0)
                    self.labels |= {as_label(v) for v in column.unique().to_pylist()} - {None}
        except (pa.ArrowException, OSError) as error:
            told = " ".join(str(error).split())[:150]
            findings.add("a file that cannot be read as Parquet", f"{name}: {told}", "dropped")
            return []
        self.class_names = self.class_names or named
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        self.names += [f"{name}: row group {i}" for i in range(len(groups))]
        self.counts += [group.num_rows for group in groups]
        self._groups += [(name, i) for i in range(len(groups))]
        return [group.total_byte_size for group in groups]

    def _check(self, name: str, schema: Any) -> None:
        for option, column in (("image", self.image), ("label", self.label)):
            if column not in schema.names:
                near = did_you_mean(column, schema.names)
                raise DataError(
                    f"data.{option}={column}: {name} has no such column.{near} "
                    f"Give one of {', '.join(schema.names)}."
                )
        kind = schema.field(self.image).type
        words = str(kind)
        if not (words in ("binary", "large_binary") or (words.startswith("struct") and BYTES in words)):
            raise DataError(
                f"data.image={self.image}: the column of {name} is of {words}; give one that holds pictures' "
                "files: binary, or Hugging Face's struct of bytes and path."
            )

    def read(self, shard: int, place: int) -> tuple[bytes, Label | None]:
        """The picture's file and its label."""
        pictures, labels = self._group(shard)
        picture = pictures[place].as_py()
        if isinstance(picture, dict):
            picture = picture[BYTES]
        return picture or b"", as_label(labels[place].as_py())

    def labels_of(self, shard: int) -> list[Label | None]:
        """Of every row of a group."""
        import pyarrow.parquet as pq

        name, group = self._groups[shard]
        with open_shard(name) as opened, pq.ParquetFile(opened) as file:
            return [as_label(v) for v in file.read_row_group(group, columns=[self.label])[0].to_pylist()]

    def _group(self, shard: int) -> tuple[Any, Any]:
        if self._process != os.getpid():
            self._held, self._process = OrderedDict(), os.getpid()
        if shard not in self._held:
            import pyarrow.parquet as pq

            while len(self._held) > self.window:
                self._held.popitem(last=False)
            name, group = self._groups[shard]
            file = pq.ParquetFile(self._files.file(name))
            table = file.read_row_group(group, columns=[self.image, self.label], use_threads=False)
            self._held[shard] = table.column(self.image), table.column(self.label)
        self._held.move_to_end(shard)
        return self._held[shard]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_held": OrderedDict()}


def class_names_of(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """The names that Hugging Face's ClassLabel keeps in a Parquet file's metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None
