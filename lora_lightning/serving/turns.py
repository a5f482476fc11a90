"""Turns: what waits for a batch, by whom and of which shape, so that nobody keeps the others waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class Order:
    """What came first is first, but of each name no more than a quarter of what is taken: what it lets wait
    beyond that stands behind those of others who come until then, and fills what they leave free."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # turn of each name's last
        self._turn, self._numbers = 0.0, count()

    def place(self, name: str) -> tuple[float, int]:
        """The place of one more of this name; the lowest is first."""
        self._last[name] = turn = max(self._turn, self._last.get(name, -1.0) + 1)
        return turn, next(self._numbers)

    def took(self, many: int) -> None:
        """So many of the first were taken."""
        self._turn += many / 4
        self._last = {name: turn for name, turn in self._last.items() if turn + 1 > self._turn}


class Turns(Generic[T]):
    """Puts batches together, of like shape, in an order that is fair between names. For several threads.

    Args:
        most: of a batch.
        wait: seconds for which what came first waits for others of its shape.
    """

    def __init__(self, most: int, wait: float) -> None:
        self.most, self.wait = most, wait
        self._changed = threading.Condition()
        self._order = Order()
        # by shape, with when it came
        self._waiting: dict[Hashable, list[tuple[tuple[float, int], float, T]]] = {}
        self._closed = False

    def put(self, name: str, shape: Hashable, item: T) -> None:
        """Let something wait."""
        with self._changed:
            waiting = self._waiting.setdefault(shape, [])
            heappush(waiting, (self._order.place(name), time.monotonic(), item))
            self._changed.notify()

    def close(self) -> None:
        """Let `take` come to an end when all that waits is taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> list[T]:
        """The next batch; empty when there will be no more. For one thread."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                shape = min(self._waiting, key=lambda shape: self._waiting[shape][0][0])
                came, waiting = self._waiting[shape][0][1], len(self._waiting[shape])
                left = came + self.wait - time.monotonic()
                if self._closed or left <= 0 or waiting >= self.most:
                    return self._batch(shape)
                self._changed.wait(left)

    def _batch(self, shape: Hashable) -> list[T]:
        waiting = self._waiting[shape]
        batch = [heappop(waiting)[-1] for _ in range(min(self.most, len(waiting)))]
        if not waiting:
            del self._waiting[shape]
        self._order.took(len(batch))
        return batch
