"""The measurements within one process: memory, first answers, and ways against each other."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving import ways
from benchmarks.serving.load import CLIENTS, Load, drive, names_of, percentiles
from benchmarks.serving.over_http import rss
from benchmarks.serving.shelves import BODIES, SHAPES, Shape, file_bytes
from lora_lightning.serving.asking import Ask
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.store import AdapterStore
from lora_lightning.utils.progress import working

Point = dict[str, Any]


def asks(shape: Shape, names: Sequence[str | None]) -> list[Ask]:
    bodies = [shape.body(n) for n in range(BODIES)]
    return [Ask(name, shape.task, bodies[i % BODIES]) for i, name in enumerate(names)]


def memory(shape: Shape, folder: Path, count: int) -> Point:
    """Bytes of the process and of tensors that so many adapters take, against their files."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a heap without holes
        return pool.submit(_memory, shape.name, folder, count).result()


def _memory(name: str, folder: Path, count: int) -> Point:
    shape = SHAPES[name]
    torch.set_num_threads(1)
    store = AdapterStore(shape.base().model, Catalog(folder), most=count)
    store.get("a0")  # what is there once
    before, start = rss("self"), time.perf_counter()
    for i in range(1, count):
        store.get(f"a{i}")
    seconds = time.perf_counter() - start
    gc.collect()
    taken = rss("self") - before
    files = sum(file_bytes(folder / f"a{i}") for i in range(1, count))
    tensors = sum(r.bytes for r in store.residents()[1:])
    return {
        "adapters": count, "file_kb": files / (count - 1) / 1000, "tensors": tensors / files,
        "process": taken / files, "load_ms": 1000 * seconds / (count - 1),
    }  # fmt: skip


def first_answers(shape: Shape, folder: Path, count: int) -> Point:
    """Of an engine at rest: an adapter that is asked for the first time, and one that is in memory."""
    engine = ways.mixed(shape, folder, count)
    engine.turns.wait = 0.0
    try:
        drive(engine, asks(shape, ["a0"] * 3), 1)
        cold, warm = [], []
        for i in range(1, count):
            cold.append(drive(engine, asks(shape, [f"a{i}"]), 1).seconds)
            warm.append(drive(engine, asks(shape, ["a0"]), 1).seconds)
    finally:
        engine.close()
    ratio = statistics.median(c / w for c, w in zip(cold, warm, strict=True))
    return {
        "adapters": count - 1, "cold_ms": 1000 * statistics.median(cold),
        "warm_ms": 1000 * statistics.median(warm), "ratio": ratio,
    }  # fmt: skip


def against(
    shape: Shape,
    engines: dict[str, Callable[[], Engine | None]],
    adapters: int,
    popularity: str,
    requests: int,
    rounds: int,
) -> dict[str, Point]:
    """Throughput and latencies of each way, in turns; "single" is asked for one adapter alone, "base" for
    none. Ratios are to "mixed" in the same round.
    """
    with opened(engines) as running:
        loads: dict[str, list[Load]] = {name: [] for name in running}
        for n in working(range(-1, rounds), shape.name, "rounds"):
            names = names_of(requests, adapters, popularity, n)
            for way, engine in running.items():
                alone: dict[str, list[str | None]] = {
                    "single": ["a0"] * requests, "base": [None] * requests
                }  # fmt: skip
                given = asks(shape, alone.get(way, names))
                load = drive(engine, given if n >= 0 else given[: 2 * CLIENTS], CLIENTS)
                if n >= 0:
                    loads[way].append(load)
    return compared(loads, "mixed")


def compared(loads: dict[str, list[Load]], to: str) -> dict[str, Point]:
    """Of each way: requests a second, milliseconds, size of batches, and how much `to` answers in the time
    of one: median and quartiles over the rounds."""
    found = {}
    for way, ours in loads.items():
        ratios = [b.cost / a.cost for a, b in zip(loads[to], ours, strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
        )
        times = percentiles([s for load in ours for s in load.latencies])
        found[way] = {
            "per_second": statistics.median(load.throughput for load in ours),
            **{f"{name}_ms": 1000 * value for name, value in times.items()},
            "batch": statistics.mean([s for load in ours for s in load.sizes] or [0]),
            "ratio": middle, "low": low, "high": high,
        }  # fmt: skip
    return found


@contextlib.contextmanager
def opened(engines: dict[str, Callable[[], Engine | None]]) -> Iterator[dict[str, Engine]]:
    """Those that there are, ended at the end."""
    made = {name: make() for name, make in engines.items()}
    running = {name: engine for name, engine in made.items() if engine is not None}
    try:
        yield running
    finally:
        for engine in running.values():
            engine.close()
