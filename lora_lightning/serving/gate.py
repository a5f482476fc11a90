"""Gate: who comes to the workers when, in an asyncio loop: so many at once, fairly between names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from heapq import heappop, heappush
from typing import Any, TypeVar

from lora_lightning.serving.turns import Order

T = TypeVar("T")
PATIENCE = 2.0  # seconds for which an upload keeps its place from others, however slow it is


class FullError(Exception):
    """There are as many requests as are allowed."""


class Gate:
    """Counts requests.

    Args:
        window: requests that are with the workers at once, from which these make their batches.
        most: requests at all, with those that are being read.
    """

    def __init__(self, window: int, most: int) -> None:
        self.free, self.most, self.inside = window, most, 0
        self._order = Order()
        self._waiting: list[tuple[tuple[float, int], asyncio.Future[None]]] = []
        self._arriving: dict[asyncio.Task[Any], float] = {}  # since when, the first first

    @contextmanager
    def place(self) -> Iterator[None]:
        """Within this context a request is counted.

        Raises:
            FullError: there is no place, and no slow upload that could give up its own.
        """
        if self.inside >= self.most and not self._given_up():
            raise FullError
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def arrival(self, upload: Coroutine[Any, Any, T]) -> T:
        """An upload that is being read, and has a place.

        Raises:
            FullError: others were without a place, and it was the slowest.
        """
        task = asyncio.create_task(upload)
        self._arriving[task] = time.monotonic()
        try:
            return await task
        except asyncio.CancelledError:
            if task not in self._arriving:
                raise FullError from None
            raise
        finally:
            self._arriving.pop(task, None)

    def _given_up(self) -> bool:
        """Whether the upload that has been read for the longest time makes room."""
        task, since = next(iter(self._arriving.items()), (None, 0.0))
        if task is None or time.monotonic() - since < PATIENCE:
            return False
        del self._arriving[task]
        task.cancel()
        return True

    @asynccontextmanager
    async def turn(self, name: str, seconds: float | None = None) -> AsyncIterator[None]:
        """Within this context a request is with the workers; who is cancelled while it waits is forgotten.

        Raises:
            asyncio.TimeoutError: its turn did not come within so many seconds.
        """
        if self.free:
            self.free -= 1
        else:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heappush(self._waiting, (self._order.place(name), mine))
            try:
                await asyncio.wait_for(mine, seconds)
            except (asyncio.CancelledError, asyncio.TimeoutError):
                if mine.done() and not mine.cancelled():
                    self._leave()
                raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        """Let the next in."""
        while self._waiting:
            _, following = heappop(self._waiting)
            if not following.done():
                self._order.took(1)
                following.set_result(None)
                return
        self.free += 1
