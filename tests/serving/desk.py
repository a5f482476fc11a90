"""The routes over an engine in the same process, without LitServe's processes."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.testclient import TestClient

from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.gate import Gate
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.routes import Manners, add_routes


class LocalDesk:
    """Asks an engine of this process."""

    def __init__(self, engine: Engine, most: int = 64) -> None:
        self.engine, self.gate, self.metrics = engine, Gate(16, most), Metrics()

    async def ask(self, ask: Ask) -> AsyncIterator[Event]:
        loop, told = asyncio.get_running_loop(), asyncio.Queue()
        async with self.gate.turn(ask.adapter or ""):
            self.engine.submit(ask, lambda event: loop.call_soon_threadsafe(told.put_nowait, event))
            while True:
                yield (event := await told.get())
                if event.what != "part":
                    return


def client_of(engine: Engine, most: int = 64, most_bytes: int = 2**25, **manners) -> TestClient:
    app = FastAPI()
    add_routes(
        app, LocalDesk(engine, most), engine.store.catalog, Manners(most_bytes, **manners), lambda: True
    )
    return TestClient(app, raise_server_exceptions=False)
