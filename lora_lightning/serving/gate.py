"""Gate: who comes to the workers when, in an asyncio loop: so many at once, one of each name in turn."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


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
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Within this context a request is counted.

        Raises:
            FullError: there is no place.
        """
        if self.inside >= self.most:
            raise FullError
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

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
            self._waiting.setdefault(name, deque()).append(mine)
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
        """Let the next in, of the name whose turn it is."""
        while self._waiting:
            name, queue = next(iter(self._waiting.items()))
            following = queue.popleft()
            if queue:
                self._waiting.move_to_end(name)
            else:
                del self._waiting[name]
            if not following.done():
                following.set_result(None)
                return
        self.free += 1
