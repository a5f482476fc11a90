"""Tar shards in WebDataset's layout: indexed once, then read at any place.

The members of a sample follow each other and have one name up to the first dot of their file's name:
`n01/0001.jpg` and `n01/0001.cls`, `.json` or `.txt`. The index of a shard (where each picture lies, and its
label) is kept in a cache folder and made again when the shard has changed.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from lora_lightning.data.decoding import SUFFIXES, UNUSABLE, problems_of
from lora_lightning.data.findings import Findings
from lora_lightning.data.pictures import tell
from lora_lightning.data.stream_sources import OpenFiles, open_shard, size_and_time
from lora_lightning.utils.atomic import make_folder, write_whole
from lora_lightning.utils.progress import working

VERSION = 1  # of the index
LABELS = ("cls", "json", "txt")  # members that hold a label, the first one that there is
LONGEST = 1 << 20  # bytes of a label's member
HEAD, TAIL = 16, 64  # bytes of a picture that are looked at when it is indexed
END = b"\0" * tarfile.BLOCKSIZE
TAR_MARK = slice(257, 262)  # of a header, where it says "ustar"
CUT, FOREIGN = "a shard that is cut short", "a shard that is no tar"
Label = int | str


@dataclass
class Index:
    """Where the pictures of one shard lie.

    Args:
        offsets, sizes: (n,), in bytes.
        labels: of each, all whole numbers or all texts.
        problems: (what, where) of what was left out.
    """

    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


class TarShards:
    """The pictures of tar shards and their labels, by shard and place.

    Args:
        names: the shards' files.
        cache: the folder of the indices.
        field: of a JSON member, that holds the label.
        most_open: files kept open in a process.
        findings: takes in what is wrong; pictures and shards that cannot be used are left out.
    """

    class_names: list[str] | None = None

    def __init__(
        self, names: Sequence[str], cache: Path, field: str, most_open: int, findings: Findings
    ) -> None:
        self.names = list(names)
        self.files = OpenFiles(most_open)
        self.indices = [index_file(name, cache, field) for name in names]
        if new := [i for i, file in enumerate(self.indices) if not file.is_file()]:
            tell(f"Indexing {len(new):,} tar shards, once: {cache} keeps it.")
        for i in working(new, "indexing", "shards"):
            write_index(self.names[i], self.indices[i], field)
        self.counts, self.labels = [], set()
        for index in self.indices:
            with np.load(index) as arrays:
                self.counts.append(len(arrays["offsets"]))
                self.labels |= set(arrays["labels"].tolist())
                for what, where in arrays["problems"].tolist():
                    findings.add(what, where, "its whole samples are kept" if what == CUT else "dropped")
        self._arrays = lru_cache(maxsize=most_open)(_loaded)

    def read(self, shard: int, place: int) -> tuple[bytes, Label]:
        """The picture's file and its label."""
        arrays = self._arrays(self.indices[shard])
        data = self.files.read(self.names[shard], int(arrays["offsets"][place]), int(arrays["sizes"][place]))
        return data, arrays["labels"][place].item()

    def labels_of(self, shard: int) -> list[Label]:
        """Of every picture of a shard."""
        return self._arrays(self.indices[shard])["labels"].tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_arrays"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._arrays = lru_cache(maxsize=self.files.most)(_loaded)


def _loaded(index: Path) -> dict[str, np.ndarray]:
    with np.load(index) as arrays:
        return {name: arrays[name] for name in ("offsets", "sizes", "labels")}


def index_file(name: str, cache: Path, field: str) -> Path:
    """Where the index of a shard as it is now belongs."""
    size, time = size_and_time(name)
    place = name if "://" in name else os.path.abspath(name)
    digest = sha256(repr((VERSION, place, size, time, field)).encode()).hexdigest()[:32]
    return cache / f"{digest}.npz"


def write_index(name: str, file: Path, field: str) -> None:
    """Make the index of a shard and keep it.

    Raises:
        WriteError: the folder cannot be written.
    """
    with open_shard(name) as opened:
        index = make_index(opened, size_and_time(name)[0], name, field)
    make_folder(file.parent)
    write_whole(file, lambda path: _save(Path(path), index))


def _save(path: Path, index: Index) -> None:
    whole = all(isinstance(label, int) for label in index.labels)
    labels = np.array(
        index.labels if whole else [str(v) for v in index.labels], np.int64 if whole else np.str_
    )
    problems = np.array(index.problems, np.str_).reshape(-1, 2)
    with open(path, "wb") as file:
        np.savez(
            file,
            offsets=np.array(index.offsets, np.int64),
            sizes=np.array(index.sizes, np.int64),
            labels=labels,
            problems=problems,
        )


def make_index(file: IO[bytes], size: int, name: str, field: str) -> Index:
    """One pass over a shard's headers, labels and the ends of its pictures.

    Args:
        file: the shard, open; `size`: its bytes; `name`: for findings.
        field: of a JSON member, that holds the label.
    """
    index = Index()
    for key, members in _samples(file, size, name, index):
        where = f"{name}: {key}"
        pictures = [m for ext, m in members.items() if f".{ext.rpartition('.')[2]}" in SUFFIXES]
        label = _label(file, members, field)
        if not pictures:
            index.problems.append(("a sample without a picture", where))
        elif label is None:
            index.problems.append(("a picture without a label", where))
        elif problem := _problem(file, pictures[0]):
            index.problems.append((f"a {problem}" if problem[0] not in "aeiou" else f"an {problem}", where))
        else:
            index.offsets.append(pictures[0].offset_data)
            index.sizes.append(pictures[0].size)
            index.labels.append(label)
    return index


def _samples(
    file: IO[bytes], size: int, name: str, index: Index
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members by name up to the first dot, then by what follows it; none that the shard's end cuts off."""
    now = ""
    members: dict[str, tarfile.TarInfo] = {}
    for member in _members(file, size, name, index):
        folder, _, base = member.name.rpartition("/")
        stem, _, ext = base.partition(".")
        if not member.isfile() or not stem:  # folders, and hidden files such as macOS's ._0001.jpg
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != now and members:
            yield now, members
            members = {}
        now = key
        members[ext.lower()] = member
    if members:
        yield now, members


def _members(file: IO[bytes], size: int, name: str, index: Index) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold every header
                if member.isfile() and member.offset_data + member.size > size:
                    break
                yield member
            file.seek(tar.offset)
    except tarfile.TarError:
        file.seek(0)
        if size > tarfile.BLOCKSIZE and not file.read(TAR_MARK.stop)[TAR_MARK].startswith(b"ustar"):
            index.problems.append((FOREIGN, name))
            return
        file.seek(0, os.SEEK_END)  # where no end mark follows
    if file.read(len(END)) != END:
        index.problems.append((CUT, name))


def _label(file: IO[bytes], members: dict[str, tarfile.TarInfo], field: str) -> Label | None:
    by_kind = {ext.rpartition(".")[2]: member for ext, member in members.items()}
    found = next(((ext, by_kind[ext]) for ext in LABELS if ext in by_kind), None)
    if found is None or found[1].size > LONGEST:
        return None
    ext, member = found
    file.seek(member.offset_data)
    text = file.read(member.size).decode("utf-8", "replace").strip()
    if ext == "json":
        try:
            text = json.loads(text)[field]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    return as_label(text)


def as_label(value: Any) -> Label | None:
    """A whole number, also where it is written as text; else a text; None for anything else."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value:
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
    return None


def _problem(file: IO[bytes], member: tarfile.TarInfo) -> str | None:
    """What makes a picture unusable, as far as its head and its end tell; where they do not, all of it."""
    file.seek(member.offset_data)
    head = file.read(min(HEAD, member.size))
    file.seek(member.offset_data + max(0, member.size - TAIL))
    tail = file.read(min(TAIL, member.size))
    if (head[:2] == b"\xff\xd8" and b"\xff\xd9" in tail) or (head[1:4] == b"PNG" and b"IEND" in tail):
        return None
    file.seek(member.offset_data)
    found = problems_of(file.read(member.size))
    return next((problem for problem in found if problem in UNUSABLE), None)
