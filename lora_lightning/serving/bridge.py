"""The engine as a LitAPI of LitServe in its worker processes, and the desk that asks it from the server's.

LitServe's own way of a request reads forms and JSON without limits, and neither query strings nor other
bodies (its issue 732); so the routes are our own, and this is what they and LitServe's queues have in common:
its LitSpec gives the queues, its LitLoop takes from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import UserError
from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.gate import Gate
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.processes import end_with
from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from litserve import LitAPI
    from litserve.loops import LitLoop
    from litserve.specs.base import LitSpec
    from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem

if TYPE_CHECKING:
    from lora_lightning.serving.engine import Engine

TAKE = 0.5  # seconds that a worker waits for a request at once
LOOK = 0.5  # seconds between two looks what has become of a request
ENDED = "ended"  # in the place of a request's number: a worker is no more


class EngineAPI(LitAPI):
    """What a worker process does.

    Args:
        build: makes the engine for a device.
        threads: of torch, in each worker; None leaves it as it is.
    """

    def __init__(self, build: Callable[[str], Engine], desk: Desk, threads: int | None) -> None:
        super().__init__(spec=desk, loop=EngineLoop())
        self.build, self.threads = build, threads
        self.family: tuple[int, int] | None = None  # the first process, and that of the queues

    def setup(self, device: str) -> None:
        """Build the engine; a user's mistake is one message of the server's."""
        if self.family:
            end_with(*self.family)
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)
        try:
            self.engine = self.build(device)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # it would add a traceback
            raise

    def predict(self, x: Any, **_: Any) -> Any:
        """LitServe asks for it; requests come to `EngineLoop`."""
        raise NotImplementedError


class EngineLoop(LitLoop):
    """Hands requests of LitServe's queue to the engine, and what it tells to the queue of the server."""

    def __call__(self, lit_api: EngineAPI, device: str, worker_id: int, request_queue: Any, transport: Any,
                 *_: Any, **__: Any) -> None:  # fmt: skip
        engine = lit_api.engine
        while True:
            try:
                asked = request_queue.get(timeout=TAKE)
            except Empty:
                continue
            except (EOFError, OSError):  # the server is gone
                return
            number, uid, _since, ask = asked
            if ask is None:
                return
            tell = partial(self._tell, engine, transport, number, uid)
            self._put(transport, number, uid, os.getpid())
            engine.submit(ask, tell)

    def _tell(self, engine: Engine, transport: Any, number: int, uid: str, event: Event) -> None:
        residents = engine.store.residents()
        told = {"adapters": len(residents), "bytes": sum(r.bytes for r in residents)}
        self._put(transport, number, uid, (event, told))

    def _put(self, transport: Any, number: int, uid: str, content: Any) -> None:
        try:
            self.put_response(transport, number, uid, content, LitAPIStatus.OK, LoopResponseType.STREAMING)
        except (EOFError, OSError):
            os._exit(1)  # the server is gone


class Desk(LitSpec):
    """Asks the workers, in the server's process.

    Args:
        gate: lets requests to the workers.
        metrics: counts.
    """

    def __init__(self, gate: Gate, metrics: Metrics) -> None:
        super().__init__()
        self.api_path = "/v1"
        self.gate, self.metrics = gate, metrics
        self._asking: set[asyncio.Task[None]] = set()  # the loop itself keeps no task from being collected
        self.ended: dict[int, float] = {}  # workers that are no more, and since when

    def __getstate__(self) -> dict[str, Any]:
        """For the workers, which need nothing of it."""
        return {"_endpoints": [], "api_path": self.api_path, "_server": None}

    @property
    def stream(self) -> bool:
        """Every answer may have parts."""
        return True

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        """What the engine tells of a request, the last time an "answer" or an "error". Who leaves before that
        leaves the turn to what a worker does for nobody now: no more is begun than for those who stay."""
        told: asyncio.Queue[Event | Exception] = asyncio.Queue()
        begun = asyncio.Event()
        asking = asyncio.create_task(self._asked(ask, told.put_nowait, begun))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        try:
            while True:
                event = await told.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.what != "part":
                    return
        finally:
            if not begun.is_set():
                asking.cancel()

    async def _asked(self, ask: Ask, tell: Callable[[Event | Exception], None], begun: asyncio.Event) -> None:
        try:
            left = None if ask.until is None else max(0.0, ask.until - time.monotonic())
            async with self.gate.turn(ask.adapter or "", left):
                begun.set()
                async for event in self._told(ask):
                    tell(event)
        except asyncio.TimeoutError:
            message = "the answer took too long: try again later, or send less."
            tell(Event("error", {"message": message}, 504))
        except Exception as error:
            tell(error)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Within this context it is seen when workers end."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        notes = self.response_buffer[ENDED] = ResponseBufferItem(asyncio.Event(), deque())
        while True:
            await notes.event.wait()
            notes.event.clear()
            while notes.response_queue:
                worker, _ = notes.response_queue.popleft()
                self.metrics.workers.pop(worker, None)
                self.ended[worker] = time.monotonic()
            for item in self.response_buffer.values():
                if item is not notes:
                    item.event.set()

    async def _told(self, ask: Ask) -> AsyncIterator[Event]:
        item, worker = ResponseBufferItem(asyncio.Event(), deque()), None
        uid, since = await self._put(ask, item)
        try:
            while True:
                left = LOOK if ask.until is None else ask.until - time.monotonic()
                if left <= 0:
                    raise asyncio.TimeoutError
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(item.event.wait(), min(left, LOOK))
                item.event.clear()
                while item.response_queue:
                    content, _ = item.response_queue.popleft()
                    if isinstance(content, int):
                        worker = content
                        continue
                    event, self.metrics.workers[worker or 0] = content
                    yield event
                    if event.what != "part":
                        return
                if worker is not None and since < self.ended.get(worker, 0.0) + 2 * TAKE:
                    yield Event("error", {"message": "a worker has ended: try again."}, 503)
                    return
                if worker is None and self._lost(since):
                    self.response_buffer.pop(uid, None)  # should it be in the queue after all
                    uid, since = await self._put(ask, item)
        finally:
            self.response_buffer.pop(uid, None)

    async def _put(self, ask: Ask, item: ResponseBufferItem) -> tuple[str, float]:
        """Let a worker take a request.

        Returns:
            Its number, and when it was put.
        """
        uid = uuid.uuid4().hex
        self.response_buffer[uid] = item
        try:
            asked = (self.response_queue_id, uid, time.monotonic(), ask)
            await asyncio.to_thread(self.request_queue.put, asked)
        except BaseException:
            self.response_buffer.pop(uid, None)
            raise
        return uid, time.monotonic()

    def _lost(self, since: float) -> bool:
        """Whether what was put into the queue then may have gone to a worker that was no more: the process of
        the queue takes for it until its wait is over, and finds nobody to give it to."""
        now = time.monotonic()
        return any(since < at + 2 * TAKE < now for at in self.ended.values())


def ended(worker: int) -> Any:
    """What LitServe's transport is to bring to the desk when a worker is no more."""
    return ENDED, (worker, LitAPIStatus.OK, LoopResponseType.STREAMING, None)
