"""The desk: what becomes of requests when workers end, without processes."""

import asyncio
import queue

from litserve.utils import LitAPIStatus

from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.bridge import Desk, ended
from lora_lightning.serving.gate import Gate
from lora_lightning.serving.metrics import Metrics

TOLD = {"adapters": 1, "bytes": 2}


def desk_of() -> Desk:
    desk = Desk(Gate(8, 8), Metrics())
    desk.response_buffer, desk.request_queue, desk.response_queue_id = {}, queue.Queue(), 0
    return desk


def bring(desk: Desk, uid: str, content: object) -> None:
    """As LitServe's transport does."""
    if (item := desk.response_buffer.get(uid)) is not None:
        item.response_queue.append((content, LitAPIStatus.OK))
        item.event.set()


async def last(desk: Desk, body: bytes) -> Event:
    async for event in desk.ask(Ask(None, "classify", body)):
        last_one = event
    return last_one


def test_when_a_worker_ends_its_requests_get_503_and_lost_ones_go_to_the_next() -> None:
    async def story() -> tuple[Event, Event, Event]:
        desk = desk_of()
        async with desk.watching():
            asked = [asyncio.create_task(last(desk, body)) for body in (b"had", b"taken", b"other")]
            uids = {}
            while len(uids) < 3:
                await asyncio.sleep(0.01)
                while not desk.request_queue.empty():
                    _, uid, _, ask = desk.request_queue.get_nowait()
                    uids[ask.body] = uid
            bring(desk, uids[b"had"], 1)
            bring(desk, uids[b"other"], 2)  # what another worker has is left with it
            desk.metrics.workers[1] = TOLD
            uid, (worker, *_) = ended(1)
            bring(desk, uid, worker)
            had = await asyncio.wait_for(asked[0], 1)
            assert 1 not in desk.metrics.workers and not asked[1].done()
            _, again, _, ask = await asyncio.to_thread(desk.request_queue.get, timeout=5)
            assert ask.body == b"taken" and again != uids[b"taken"]
            bring(desk, uids[b"taken"], (Event("answer", {"from": "nobody"}), TOLD))
            bring(desk, again, 1)  # a new worker, whose process has the number of the one before
            bring(desk, again, (Event("answer", {"from": "next"}), TOLD))
            bring(desk, uids[b"other"], (Event("answer", {"from": "other"}), TOLD))
            taken, other = await asyncio.wait_for(asyncio.gather(*asked[1:]), 5)
            assert desk.request_queue.empty() and list(desk.response_buffer) == [uid]
            return had, taken, other

    had, taken, other = asyncio.run(story())
    assert had.status == 503 and "try again" in had.content["message"]
    assert taken.content == {"from": "next"} and other.content == {"from": "other"}


def test_who_leaves_leaves_the_turn_to_what_a_worker_has_begun() -> None:
    """Otherwise a worker would be given what others ask on top of all that nobody waits for."""

    async def story() -> None:
        desk = desk_of()
        desk.gate.free = 1
        first, second, third = (asyncio.create_task(last(desk, body)) for body in (b"1", b"2", b"3"))
        _, uid, _, ask = await asyncio.to_thread(desk.request_queue.get, timeout=5)
        assert ask.body == b"1"
        first.cancel()
        second.cancel()  # waits for its turn, and is forgotten
        await asyncio.sleep(0.05)
        assert desk.request_queue.empty() and desk.gate.free == 0 and uid in desk.response_buffer
        bring(desk, uid, 1)
        bring(desk, uid, (Event("answer", {}), TOLD))
        _, uid, _, ask = await asyncio.to_thread(desk.request_queue.get, timeout=5)
        assert ask.body == b"3" and desk.metrics.workers == {1: TOLD}
        bring(desk, uid, (Event("answer", {"for": "3"}), TOLD))
        assert (await third).content == {"for": "3"}
        await asyncio.sleep(0)
        assert desk.gate.free == 1 and not desk.response_buffer and not desk._asking

    asyncio.run(story())
