"""The check of pictures before training: each file looked at once, by threads, and what is the same found."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_lightning.data.decoding import MENDED, UNUSABLE, problems_of
from lora_lightning.data.findings import Findings
from lora_lightning.data.picture_rows import PictureRow
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.progress import working

DECODED = 20_000  # pictures up to which each is decoded whole; of more, heads and ends are looked at
THREADS = 8
SAMPLE = 1 << 16  # bytes at either end of a file, by which files of one size are told apart first
Item = TypeVar("Item")
Result = TypeVar("Result")


class Look(NamedTuple):
    """What a file is: its size in bytes, when it was changed, whether all of it was decoded, its problems."""

    size: int
    changed: int
    whole: bool
    problems: tuple[str, ...]


def checked(rows: Sequence[PictureRow], findings: Findings, cache: Path | None = None) -> list[PictureRow]:
    """The rows whose pictures can be used; everything else that was found goes into `findings`.

    Args:
        rows: what is looked at.
        findings: where problems are counted.
        cache: a file that keeps what was seen of unchanged files; None for none.
    """
    looks = look([row.file for row in rows], cache)
    kept = []
    for row in rows:
        found = looks[row.file].problems
        for problem in found:
            if problem in UNUSABLE:
                findings.add(problem, row.name, "left out")
            else:
                findings.add(problem, row.name, MENDED[problem], harmless=True)
        if not any(problem in UNUSABLE for problem in found):
            kept.append(row)
    return kept


def look(files: Sequence[str], cache: Path | None = None) -> dict[str, Look]:
    """Each file looked at once, or taken from the cache where it has not changed since."""
    whole = len(files) <= DECODED
    known = _read(cache)

    def one(file: str) -> Look:
        try:
            state = os.stat(file)
            size, changed = state.st_size, state.st_mtime_ns
        except OSError:
            size = changed = 0
        before = known.get(file)
        if before and (before.size, before.changed) == (size, changed) and (before.whole or not whole):
            return before
        return Look(size, changed, whole, tuple(problems_of(file, whole)))

    distinct = list(dict.fromkeys(files))
    found = dict(zip(distinct, _in_threads(one, distinct, "checking pictures"), strict=True))
    if cache is not None and any(known.get(file) is not seen for file, seen in found.items()):
        _write(cache, found)
    return found


def same_pictures(files: Sequence[str]) -> list[list[int]]:
    """Places in a list of files that have the same content, a list for each content that is there twice.

    Only files of equal size are read, and whole only those that begin and end alike.
    """
    by_size: dict[Any, list[int]] = defaultdict(list)
    for place, file in enumerate(files):
        by_size[os.stat(file).st_size].append(place)
    for whole in (False, True):
        places = [place for group in by_size.values() if len(group) > 1 for place in group]
        same = [files[place] for place in places]
        digests = _in_threads(partial(_digest, whole=whole), same, "comparing pictures")
        by_size = defaultdict(list)
        for place, digest in zip(places, digests, strict=True):
            by_size[digest].append(place)
    return [group for group in by_size.values() if len(group) > 1]


def _digest(file: str, whole: bool) -> tuple[int, bytes]:
    size = os.stat(file).st_size
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as opened:
        if whole:
            while block := opened.read(1 << 20):
                digest.update(block)
        else:
            digest.update(opened.read(SAMPLE))
            opened.seek(max(size - SAMPLE, 0))
            digest.update(opened.read(SAMPLE))
    return size, digest.digest()


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
    """PIL decodes and files are read without Python's lock, so that threads share the work."""
    if not items:
        return []
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return list(working(pool.map(function, items, chunksize=16), what, "pictures", len(items)))


def cache_file(name: str) -> Path:
    """Where the check of one data set keeps what it saw: under XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (
        Path(home) / "lora_lightning" / "pictures" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    )


def _read(cache: Path | None) -> dict[str, Look]:
    try:
        stored = json.loads(cache.read_text()) if cache else {}
        return {
            file: Look(
                int(size), int(changed), bool(whole), tuple(p for p in found if p in (*UNUSABLE, *MENDED))
            )
            for file, (size, changed, whole, found) in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or of another version: everything is looked at


def _write(cache: Path, found: dict[str, Look]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found)
        write_whole(cache, lambda temporary: Path(temporary).write_text(text))
    except OSError:
        return  # a home that cannot be written: the next run looks again
