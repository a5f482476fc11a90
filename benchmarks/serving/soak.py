"""A server at full load for minutes, while adapters come, change and go: whether its memory stays, and every
answer is that of `lora-lightning predict` or `transcribe` with an adapter that was there."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lora_lightning as ll
from benchmarks.serving import over_http
from benchmarks.serving.load import CLIENTS, percentiles
from benchmarks.serving.shelves import BODIES, SHAPES, Shape, heads_of, vary
from lora_lightning.serving.catalog import FILES, FRESH

STEADY, MOVING = 12, 4  # adapters; those that move have two versions
PAUSE = 0.25  # seconds between two changes of the folder
LOOK = 2.0  # seconds between two looks at the memory
NEAR = 1e-5  # of a probability
NEAR_ROUNDED = 1.1e-3  # of one that is told with 3 digits
TOLD, AROUND = 20, 9.0  # wrong answers that are written down; seconds of their names' history about each
Answer = dict[str, Any]


@dataclass
class Tally:
    """What clients have seen.

    Attributes:
        wrong: answers that no adapter gives that was there.
        rss: bytes by process, with the second.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    rss: dict[int, list[tuple[float, int]]] = field(default_factory=dict)


@dataclass
class Span:
    """When a name may mean a version, None none: from before a change until after the next."""

    version: Path | None
    since: float
    until: float = math.inf


class Shelf:
    """A folder that changes, and what was in it when.

    Args:
        versions: folders of the versions that each name may have.
    """

    def __init__(self, folder: Path, versions: dict[str, list[Path]]) -> None:
        self.folder, self.versions = folder, versions
        shutil.rmtree(folder, ignore_errors=True)
        self.changes = 0
        self.history: dict[str, list[Span]] = {}
        for name, paths in versions.items():
            shutil.copytree(paths[0], folder / name)
            self.history[name] = [Span(paths[0], 0.0)]

    def change(self, generator: random.Random) -> None:
        """Replace, remove or add one of those that move."""
        name = generator.choice([n for n, paths in self.versions.items() if len(paths) > 1])
        present = self.history[name][-1].version
        new = generator.choice([p for p in (*self.versions[name], None) if p != present])
        place, aside = self.folder / name, self.folder / f".{name}"
        if present is None:
            shutil.copytree(str(new), aside)
        elif new is not None:
            for file in FILES:
                shutil.copy(new / file, place / f".{file}")
        self.history[name].append(Span(new, time.monotonic()))
        if new is None:
            os.replace(place, aside)
        elif present is None:
            os.replace(aside, place)
        else:
            for file in FILES:  # as save_adapter does
                os.replace(place / f".{file}", place / file)
        self.history[name][-2].until = time.monotonic()
        if new is None:
            shutil.rmtree(aside)
        self.changes += 1

    def there(self, name: str, begun: float, ended: float) -> set[Path | None]:
        """What the name may have meant to a request."""
        early = begun - FRESH - 1.0  # what was listed is taken for a second
        return {
            span.version for span in list(self.history[name]) if span.since <= ended and span.until >= early
        }

    def told(self, name: str, begun: float, ended: float) -> list[list[Any]]:
        """What the name meant around that time: version, since, until."""
        return [
            [span.version and span.version.name, span.since, min(span.until, ended + AROUND)]
            for span in list(self.history[name])
            if span.since <= ended + AROUND and span.until >= begun - AROUND
        ]


def soaked(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    """The numbers of a soak."""
    shape = SHAPES[name]
    versions = _versions(shape, folder / f"soak_{name}_versions")
    wanted = {path: offline(shape, path) for paths in versions.values() for path in paths}
    shelf = Shelf(folder / f"soak_{name}", versions)
    tally, end = Tally(), threading.Event()
    with over_http.server(name, shelf.folder, adapters=256) as running:
        threads = [
            threading.Thread(target=_client, args=(shape, running.address, shelf, wanted, tally, end, n))
            for n in range(CLIENTS)
        ]
        threads.append(threading.Thread(target=_changes, args=(shelf, end)))
        start = time.monotonic()
        for thread in threads:
            thread.start()
        while time.monotonic() - start < seconds:
            time.sleep(min(LOOK, seconds / 10))
            for process, size in running.memory().items():
                tally.rss.setdefault(process, []).append((time.monotonic() - start, size))
        end.set()
        for thread in threads:
            thread.join()
    times = percentiles(tally.latencies)
    return {
        "seconds": seconds, "requests": len(tally.latencies), "changes": shelf.changes,
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "wrong": len(tally.wrong), "wrong_answers": tally.wrong[:TOLD],
        **{f"{n}_ms": 1000 * value for n, value in times.items()},
        "memory": [_slope(seen) for seen in tally.rss.values() if len(seen) > 4],
    }  # fmt: skip


def _slope(seen: list[tuple[float, int]]) -> dict[str, float]:
    """Megabytes of a process at the beginning and the end of the second half, and a minute's growth in it."""
    half = seen[len(seen) // 2 :]
    times, sizes = [t for t, _ in half], [size / 1e6 for _, size in half]
    slope = statistics.linear_regression(times, sizes).slope if len({*times}) > 1 else 0.0
    return {"begin_mb": seen[0][1] / 1e6, "half_mb": sizes[0], "end_mb": sizes[-1], "mb_a_minute": 60 * slope}


def _client(
    shape: Shape, address: str, shelf: Shelf, wanted: dict[Path, list[Answer]], tally: Tally,
    end: threading.Event, number: int,
) -> None:  # fmt: skip
    generator, client = random.Random(number), over_http.Client(address)
    bodies = [shape.body(n) for n in range(BODIES)]
    while not end.is_set():
        name, n = generator.choice(list(shelf.versions)), generator.randrange(BODIES)
        begun = time.monotonic()
        status, answer = client.ask(shape.task, name, bodies[n])
        ended = time.monotonic()
        there = shelf.there(name, begun, ended)
        paths = [path for path in there if path is not None and status == 200]
        right = [equal(answer, wanted[path][n]) for path in paths]
        tally.statuses[status] += 1
        tally.latencies.append(ended - begun)
        if not (any(right) if status == 200 else status == 404 and None in there):
            versions = [p.name for p in shelf.versions[name] if status == 200 and equal(answer, wanted[p][n])]
            tally.wrong.append({
                "name": name, "upload": n, "status": status, "begun": begun, "ended": ended,
                "answer": answer, "answer_of": versions, "history": shelf.told(name, begun, ended),
            })  # fmt: skip


def _changes(shelf: Shelf, end: threading.Event) -> None:
    generator = random.Random(0)
    while not end.wait(PAUSE):
        shelf.change(generator)


def _versions(shape: Shape, folder: Path) -> dict[str, list[Path]]:
    """Adapters that the commands can use, as a run leaves them."""
    shutil.rmtree(folder, ignore_errors=True)
    model = shape.adapted()
    heads, seed = heads_of(model), 0
    versions: dict[str, list[Path]] = {}
    for name in [*(f"steady{i}" for i in range(STEADY)), *(f"moving{i}" for i in range(MOVING))]:
        for version in range(1 + name.startswith("moving")):
            path = folder / f"{name}_{version}"
            vary(model, heads, 1000 + seed)
            ll.save_adapter(model, path, origin={"config": shape.config, "facts": dict(shape.facts)})
            versions.setdefault(name, []).append(path)
            seed += 1
    return versions


def offline(shape: Shape, adapter: Path) -> list[Answer]:
    """What the command says of each upload."""
    from lora_lightning.app.cli import main

    files = adapter.parent / "uploads"
    files.mkdir(exist_ok=True)
    suffix = "png" if shape.task == "classify" else "wav"
    for n in range(BODIES):
        (files / f"{n}.{suffix}").write_bytes(shape.body(n))
    out = adapter.parent / f"{adapter.name}.out"
    if shape.task == "classify":
        main(["predict", f"images={files}", f"adapter={adapter}", f"out={out}.json", "top=10"])
        return [_row(row) for row in json.loads(Path(f"{out}.json").read_text())]
    main(["transcribe", str(files), f"adapter={adapter}", "format=json", f"out={out}"])
    return [json.loads(file.read_text()) for file in sorted(out.iterdir())]


def _row(row: dict[str, Any]) -> Answer:
    ends = ["", *(f"_{n}" for n in range(2, 11))]
    pairs = [{"label": row[f"label{e}"], "probability": row[f"probability{e}"]} for e in ends]
    return {"predictions": pairs}


def equal(answer: Answer, wanted: Answer) -> bool:
    """Whether an answer is the command's."""
    if "predictions" in wanted:
        known = {p["label"]: p["probability"] for p in wanted["predictions"]}
        return all(abs(p["probability"] - known.get(p["label"], 2.0)) <= NEAR for p in answer["predictions"])
    ours, theirs = ([w for s in a["segments"] for w in s["words"]] for a in (answer, wanted))
    return answer["text"] == wanted["text"] and len(ours) == len(theirs) and all(
        (a["start"], a["end"]) == (b["start"], b["end"])
        and abs(a["confidence"] - b["confidence"]) <= NEAR_ROUNDED
        for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip
