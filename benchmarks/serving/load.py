"""Clients of an engine: as many as one likes, each of whom asks again when it has its answer."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lora_lightning.serving.asking import Ask, Event

if TYPE_CHECKING:
    from lora_lightning.serving.engine import Engine

CLIENTS = 32
ZIPF = 1.0  # exponent: the n-th of the names is asked for 1/n as often as the first


@dataclass
class Load:
    """What came of one run.

    Attributes:
        seconds: of all.
        latencies: of each request, seconds.
        cost: seconds that count: of the processor where the engine is in this process, which others on the
            machine disturb less.
        sizes: of the batches that each was in.
    """

    seconds: float
    latencies: list[float]
    cost: float
    sizes: list[int] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        return len(self.latencies) / self.seconds


def names_of(count: int, adapters: int, popularity: str, seed: int) -> list[str]:
    """Adapters that are asked for one after the other, "uniform" or "zipf"."""
    generator = random.Random(seed)
    if popularity == "uniform":
        return [f"a{generator.randrange(adapters)}" for _ in range(count)]
    weights = list(accumulate((i + 1) ** -ZIPF for i in range(adapters)))
    return [f"a{i}" for i in generator.choices(range(adapters), cum_weights=weights, k=count)]


def drive(engine: Engine, asks: Sequence[Ask], clients: int) -> Load:
    """Ask an engine of this process.

    Raises:
        RuntimeError: an answer is an error.
    """
    lock, ended = threading.Lock(), threading.Event()
    waiting = iter(asks)
    latencies: list[float] = []
    sizes: list[int] = []
    errors: list[Any] = []

    def ask() -> None:
        with lock:
            one = next(waiting, None)
        if one is None:
            return
        begun = time.perf_counter()

        def told(event: Event) -> None:
            with lock:
                latencies.append(time.perf_counter() - begun)
                sizes.append(event.batch)
                if event.what != "answer":
                    errors.append(event.content)
                if len(latencies) == len(asks):
                    ended.set()
            ask()

        engine.submit(one, told)

    start, cost = time.perf_counter(), time.process_time()
    for _ in range(min(clients, len(asks))):
        ask()
    ended.wait()
    seconds, cost = time.perf_counter() - start, time.process_time() - cost
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    return Load(seconds, latencies, cost, sizes)


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99."""
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}
