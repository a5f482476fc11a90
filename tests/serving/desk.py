"""The routes over an engine in the same process, without LitServe's processes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from lora_lightning.serving.asking import Ask, Event
from lora_lightning.serving.connections import Connection
from lora_lightning.serving.engine import Engine
from lora_lightning.serving.gate import Gate
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.page import add_pages
from lora_lightning.serving.routes import Manners, add_routes
from lora_lightning.serving.server import Token


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


def app_of(engine: Engine, most: int = 64, most_bytes: int = 2**25, **manners) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)
    add_pages(app)
    add_routes(
        app, LocalDesk(engine, most), engine.store.catalog, Manners(most_bytes, **manners), lambda: True
    )
    return app


def client_of(engine: Engine, *args, **manners) -> TestClient:
    return TestClient(app_of(engine, *args, **manners), raise_server_exceptions=False)


@contextmanager
def listening(engine: Engine, token: str | None = None, **options) -> Iterator[str]:
    """The address of a server in a thread of this process, for what needs a socket."""
    app = app_of(engine, **options)
    if token:
        app.add_middleware(Token, token=token)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http=Connection, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
