"""Folders that Lightning's litdata optimized, read at any place by its own StreamingDataset."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Sequence
from typing import Any

from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.stream_sources import INDEX, files_of, is_url
from lora_lightning.data.stream_tar import Label, as_label
from lora_lightning.errors import did_you_mean
from lora_lightning.utils.libraries import loading

# What an item may be made of. Nothing else is read: "pickle" and others would run what the file says.
PICTURES = ("bytes", "jpeg", "image", "pil", "file")
LABELS = ("int", "str", "text")
CONTAINERS = ("builtins.dict", "builtins.list", "builtins.tuple")


class LitdataShards:
    """The pictures of optimized folders and their labels, by chunk and place.

    Items are mappings with the keys `image` and `label`, or pairs of a picture and a label.

    Args:
        folders: each with its `index.json`.
        image, label: the keys.
        findings: takes in what is wrong; chunks that cannot be read are left out.

    Attributes:
        names, counts: of each chunk.

    Raises:
        DataError: the items are of other kinds.
    """

    class_names: list[str] | None = None

    def __init__(self, folders: Sequence[str], image: str, label: str, findings: Findings) -> None:
        with loading("litdata", "stream"), contextlib.redirect_stdout(None):  # it advertises itself
            importlib.import_module("litdata")
        self.folders, self.image, self.label = list(folders), image, label
        self.names: list[str] = []
        self.counts: list[int] = []
        self.labels: set[Any] = set()
        self._chunks: list[tuple[int, int]] = []  # the folder and the first item of each chunk
        for number, folder in enumerate(folders):
            self._add(number, folder, findings)
        self._sets: dict[int, Any] = {}
        self._process = os.getpid()

    def _add(self, number: int, folder: str, findings: Findings) -> None:
        index = f"{folder.rstrip('/')}/{INDEX}"
        try:
            content = json.loads(files_of("source", folder).cat_file(index))
            config, chunks = content["config"], content["chunks"]
            self._check(folder, config)
            listed = [(str(c["filename"]), int(c["chunk_size"]), int(c["chunk_bytes"])) for c in chunks]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{index} is not an index of litdata's: {type(error).__name__}: {error}. "
                "Copy the folder anew."
            ) from None
        first = 0
        for file, count, size in listed:
            path = f"{folder.rstrip('/')}/{file}"
            if problem := None if is_url(folder) else _cut(path, size, config):
                findings.add(problem, path, "dropped")
            else:
                self.names.append(path)
                self.counts.append(count)
                self._chunks.append((number, first))
            first += count

    def _check(self, folder: str, config: Any) -> None:
        """Refuses items that are not a picture and a label, before anything of them is read."""
        formats = [str(f).partition(":")[0] for f in config["data_format"] or []]
        foreign = [f for f in formats if f not in (*PICTURES, *LABELS, "float", "bool")]
        spec = json.loads(config["data_spec"])[1]
        foreign += [c for c in _containers(spec) if c not in CONTAINERS]
        if foreign or config.get("item_loader") not in (None, "PyTreeLoader"):
            raise DataError(
                f"{folder}: its items hold {', '.join(foreign) or config['item_loader']}, which is not read: "
                f"give a picture ({', '.join(PICTURES)}) and a label ({', '.join(LABELS)}); anything else "
                "could run what the file says."
            )
        self._check_keys(folder, spec)
        if config.get("encryption"):
            raise DataError(f"{folder}: is encrypted, which is not read. Optimize it without encryption.")

    def _check_keys(self, folder: str, spec: Any) -> None:
        if spec["type"] != CONTAINERS[0]:
            if len(spec["children_spec"]) != 2:
                raise DataError(
                    f"{folder}: its items are neither mappings nor pairs of a picture and a label: "
                    "optimize such."
                )
            return
        keys = [str(key) for key in json.loads(spec["context"])]
        for option, key in (("image", self.image), ("label", self.label)):
            if key not in keys:
                near = did_you_mean(key, keys)
                raise DataError(
                    f"data.{option}={key}: the items of {folder} have no such part.{near} "
                    f"Give one of {', '.join(keys)}."
                )

    def read(self, shard: int, place: int) -> tuple[Any, Label | None]:
        """The picture's file, or the picture where litdata keeps its pixels, and its label."""
        number, first = self._chunks[shard]
        item = self._set(number)[first + place]
        if isinstance(item, dict):
            return item[self.image], _label(item[self.label])
        return item[0], _label(item[1])

    def labels_of(self, shard: int) -> list[Label | None]:
        """Of every item of a chunk, for which all of it is read."""
        return [self.read(shard, place)[1] for place in range(self.counts[shard])]

    def _set(self, number: int) -> Any:
        if self._process != os.getpid():
            self._sets, self._process = {}, os.getpid()
        if number not in self._sets:
            self._sets[number] = streaming_dataset(self.folders[number])
        return self._sets[number]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_sets": {}}


def streaming_dataset(folder: str) -> Any:
    """litdata's own dataset, whose pictures are left as the files that they are."""
    from litdata import StreamingDataset
    from litdata.streaming.serializers import BytesSerializer

    kept = BytesSerializer()
    return StreamingDataset(folder, shuffle=False, serializers={"jpeg": kept, "image": kept})


def _label(value: Any) -> Label | None:
    """A text as it is written, which may be the name of a class though it looks like a number."""
    return value or None if isinstance(value, str) else as_label(value)


def _containers(spec: Any) -> list[str]:
    if not isinstance(spec, dict):
        return [str(spec)]
    inside = [name for child in spec.get("children_spec", []) for name in _containers(child)]
    return ([spec["type"]] if spec.get("type") else []) + inside


def _cut(path: str, size: int, config: Any) -> str | None:
    if not os.path.isfile(path):
        return "a chunk that is not there"
    return "a chunk that is cut short" if not config["compression"] and os.path.getsize(path) < size else None
