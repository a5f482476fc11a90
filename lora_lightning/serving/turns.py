"""Turns: what waits for a batch, by whom and of which shape, so that nobody keeps the others waiting."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Puts batches together: of like shape, one of each name in turn. For several threads.

    Args:
        most: of a batch.
        wait: seconds for which what came first waits for others of its shape.
    """

    def __init__(self, most: int, wait: float) -> None:
        self.most, self.wait = most, wait
        self._changed = threading.Condition()
        # the name whose turn it is first; of each what waits, by shape, with when it came
        self._names: OrderedDict[str, dict[Hashable, deque[tuple[float, T]]]] = OrderedDict()
        self._count: Counter[Hashable] = Counter()
        self._closed = False

    def put(self, name: str, shape: Hashable, item: T) -> None:
        """Let something wait."""
        with self._changed:
            shapes = self._names.setdefault(name, {})
            shapes.setdefault(shape, deque()).append((time.monotonic(), item))
            self._count[shape] += 1
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
                self._changed.wait_for(lambda: self._names or self._closed)
                if not self._names:
                    return []
                first = next(iter(self._names.values()))  # whose turn it is decides the shape, by its oldest
                came, place = min((queue[0][0], i) for i, queue in enumerate(first.values()))
                shape = list(first)[place]
                left = came + self.wait - time.monotonic()
                if self._closed or left <= 0 or self._count[shape] >= self.most:
                    return self._batch(shape)
                self._changed.wait(left)

    def _batch(self, shape: Hashable) -> list[T]:
        batch: list[T] = []
        while len(batch) < self.most and self._count[shape]:
            for name in [n for n, shapes in self._names.items() if shape in shapes][: self.most - len(batch)]:
                shapes = self._names[name]
                batch.append(shapes[shape].popleft()[1])
                self._count[shape] -= 1
                if not shapes[shape]:
                    del shapes[shape]
                if shapes:
                    self._names.move_to_end(name)
                else:
                    del self._names[name]
        self._count += Counter()  # without what is 0
        return batch
