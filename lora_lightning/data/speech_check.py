"""The check of speech before training: every utterance that cannot be used, in one pass and one table."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_lightning.data.audio import AudioError, decode
from lora_lightning.data.manifests import Row
from lora_lightning.data.text import normalize, unknown
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.progress import working
from lora_lightning.utils.tables import format_table

SILENT = -50.0  # dB below full scale: no sample of a recording of speech is this weak
CHARACTERS_PER_SECOND = 25  # fast speech has 20; CTC needs a frame for each, and frames last up to 40 ms
SHOWN = 2  # examples of each problem
KINDS = (
    "unreadable", "silent", "too short", "too long", "empty text", "unknown characters",
    "more text than speech",
)  # fmt: skip


class Sound(NamedTuple):
    """What a pass over the samples of a row gives: seconds, the peak in dB of full scale, or an error."""

    seconds: float
    peak: float
    error: str = ""


class Finding(NamedTuple):
    """A row that cannot be used, one of KINDS, and what was found."""

    row: Row
    kind: str
    detail: str
    seconds: float


class Limits(NamedTuple):
    """What an utterance may be: its least and greatest seconds."""

    least: float
    most: float


def check(
    rows: Sequence[Row], vocabulary: Sequence[str], limits: Limits, cache: Path | None = None
) -> tuple[dict[Row, float], list[Finding]]:
    """Decode every row once, and find what cannot be trained or tested on.

    Args:
        rows: the utterances.
        vocabulary: what the recognizer can write.
        limits: in seconds.
        cache: a file that keeps what was heard of unchanged files; None for none.

    Returns:
        Seconds of each row that is sound, in order, and what was found, one finding a row.
    """
    sounds = listen(rows, cache)
    good, found = {}, []
    for row, sound in zip(rows, sounds, strict=True):
        problem = _problem(sound, normalize(row.text, vocabulary), vocabulary, limits)
        if problem is None:
            good[row] = sound.seconds
        else:
            found.append(Finding(row, *problem, sound.seconds))
    return good, found


def _problem(sound: Sound, text: str, vocabulary: Sequence[str], limits: Limits) -> tuple[str, str] | None:
    """Kind and detail, or None."""
    lacking = unknown([text], vocabulary)
    if sound.error:
        return "unreadable", sound.error
    if sound.seconds < limits.least:
        return "too short", f"{sound.seconds:.2f} s, least {limits.least:g} s"
    if sound.seconds > limits.most:
        return "too long", f"{sound.seconds:.1f} s, most {limits.most:g} s"
    if sound.peak < SILENT:
        return "silent", f"peak {sound.peak:.0f} dB"
    if not text:
        return "empty text", "nothing but punctuation or white space"
    if lacking:
        return "unknown characters", " ".join(sorted(lacking))
    if len(text) > CHARACTERS_PER_SECOND * sound.seconds:
        return "more text than speech", f"{len(text)} characters in {sound.seconds:.1f} s"
    return None


def findings_table(found: Sequence[Finding]) -> str:
    """A line for each kind of problem, with examples; characters that are lacking with their counts."""
    lines = []
    for kind in KINDS:
        of_kind = [f for f in found if f.kind == kind]
        if not of_kind:
            continue
        examples = "; ".join(f"{_place(f.row)}: {f.detail}" for f in of_kind[:SHOWN])
        if kind == "unknown characters":
            counts = Counter(c for f in of_kind for c in f.detail.split())
            listed = ", ".join(f"{c!r} {n}" for c, n in counts.most_common(20))
            examples = f"in so many texts: {listed}; {_place(of_kind[0].row)}"
        lines.append((kind, len(of_kind), f"{sum(f.seconds for f in of_kind):.0f}", examples))
    return format_table(("problem", "utterances", "seconds", "for example"), lines)


def _place(row: Row) -> str:
    part = "" if row.start is None and row.end is None else f" from {row.start or 0:g} s"
    return f"{row.path}{part}"


def listen(rows: Sequence[Row], cache: Path | None = None) -> list[Sound]:
    """Seconds and peak of each row, from threads of which each decodes a file at a time."""
    known = _read(cache)
    keys = [_key(row) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    if new:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sounds = pool.map(_listen, new.values())
            known |= zip(new, working(sounds, "checking audio", "utterances", len(new)), strict=True)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({key: known[key] for key in keys})
            write_whole(cache, lambda temporary: Path(temporary).write_text(text))
    return [known[key] for key in keys]


def cache_file(name: str) -> Path:
    """Where the check of one corpus or manifest keeps what it heard: under XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lora_lightning" / "audio" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _listen(row: Row) -> Sound:
    try:
        samples, rate = decode(row.path, row.start, row.end)
    except AudioError as error:
        return Sound(0.0, -np.inf, str(error).removeprefix(f"{row.path}: "))
    if not np.isfinite(samples).all():
        return Sound(0.0, -np.inf, "has samples that are not finite")
    peak = float(np.abs(samples.mean(1)).max())
    return Sound(len(samples) / rate, 20 * float(np.log10(max(peak, 1e-10))))


def _key(row: Row) -> str:
    """The part of the file and what changes when the file does."""
    try:
        state = os.stat(row.path)
        version = f"{state.st_size} {state.st_mtime_ns}"
    except OSError:
        version = "absent"
    fields = asdict(row)
    return f"{fields['path']} {fields['start']} {fields['end']} {version}"


def _read(cache: Path | None) -> dict[str, Sound]:
    try:
        return {key: Sound(*value) for key, value in json.loads(cache.read_text()).items()} if cache else {}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # none yet, or of another version: everything is listened to
