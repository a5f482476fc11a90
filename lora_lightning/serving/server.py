"""The server: LitServe's processes around the engine, with our routes; its beginning and its end."""

from __future__ import annotations

import hmac
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_lightning.errors import UserError
from lora_lightning.serving.bridge import Desk, EngineAPI, ended
from lora_lightning.serving.catalog import Catalog
from lora_lightning.serving.connections import Connection
from lora_lightning.serving.gate import Gate
from lora_lightning.serving.metrics import Metrics
from lora_lightning.serving.openai import errors_shape
from lora_lightning.serving.page import PAGES, add_pages
from lora_lightning.serving.processes import end_children, end_with, undisturbed
from lora_lightning.serving.routes import Manners, add_routes
from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from litserve import LitServer
    from litserve.utils import WorkerSetupStatus
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from lora_lightning.serving.engine import Engine

LOOK = 0.2  # seconds between two looks whether the processes live
AGAIN = 5.0  # seconds between two starts of one worker, where it ends at once
GONE = "a process that the others need has ended: start the server again."
OPEN = ("/health", "/ready", *PAGES)  # without a token: the pages hold nothing of the server
TOKEN = "LORA_LIGHTNING_TOKEN"


@dataclass(frozen=True)
class Place:
    """Where and how a server runs.

    Attributes:
        port: 0 takes a free one.
        workers: processes with the model, on each device.
        accelerator: "cpu", "cuda", "mps" or "auto".
        threads: of torch in each worker; None shares the cores.
        queue: requests at once, with those that are being read.
        batch: of the engine, whose workers are given twice as many.
        token: that requests are to bring; None asks for none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    accelerator: str = "auto"
    threads: int | None = None
    queue: int = 64
    batch: int = 8
    token: str | None = None


class Token:
    """Middleware that answers nobody without the token, but whether the server runs.

    Args:
        token: as in `Authorization: Bearer TOKEN`.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.wanted = app, f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            given = given[:7].lower() + given[7:]
            if not hmac.compare_digest(given, self.wanted):
                message = "give the token: Authorization: Bearer TOKEN."
                headers = {"www-authenticate": "Bearer"}
                await JSONResponse(errors_shape(401, message), 401, headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Server(LitServer):
    """LitServe's server with our routes in the place of its own.

    Args:
        build: makes the engine of a worker for its device; is sent to its process.
        what: is served, for the line at its start.

    Raises:
        UserError: the machine has no device of the kind.
    """

    def __init__(
        self, build: Callable[[str], Engine], catalog: Catalog, place: Place, manners: Manners, what: str
    ) -> None:
        self.place, self.what, self.broken = place, what, ""
        self.desk = desk = Desk(Gate(0, place.queue), Metrics())
        self.api = EngineAPI(build, desk, place.threads)
        super().__init__(
            self.api,
            accelerator=place.accelerator,
            workers_per_device=place.workers,
            timeout=False,
            restart_workers=True,
        )
        count = len(self._inference_workers_config_for_api(desk.api_path))  # only LitServe knows the devices
        if not count:
            raise UserError(
                f"device={place.accelerator}: this machine shows no such device. Give device=cpu."
            )
        desk.gate.free = 2 * place.batch * count
        self.api.threads = place.threads or max(1, (os.cpu_count() or 1) // count)
        self.uvicorn_graceful_timeout = round(manners.timeout)
        self.app.title = "lora_lightning"
        # LitServe's own addresses tell of its workers, FastAPI's pages load their parts from elsewhere
        kept = [r for r in self.app.router.routes if getattr(r, "path", "") == self.app.openapi_url]
        self.app.router.routes[:] = kept
        add_pages(self.app)
        add_routes(self.app, desk, catalog, manners, self.ready)
        if place.token:
            self.app.add_middleware(Token, token=place.token)

    def ready(self) -> bool:
        """Whether a worker can answer."""
        return any(status == WorkerSetupStatus.READY for status in self.workers_setup_status.values())

    def serve(self) -> None:
        """Answer requests until SIGTERM or Ctrl-C, and end those that are here already.

        Raises:
            UserError: the port is taken, a worker cannot begin, or a process that the others need has ended.
            KeyboardInterrupt: Ctrl-C ended it; SIGTERM is the usual end.
        """
        port = free_port(self.place.host, self.place.port)
        self.first = os.getpid()
        self.manager: Any = None
        self.watching: threading.Thread | None = None
        self.begun: list[Any] = []
        self.ending = threading.Event()
        self.told = self.interrupted = False  # by SIGTERM; by Ctrl-C, unless told
        signal.signal(signal.SIGTERM, self._told)
        try:
            self.run(
                host=self.place.host,
                port=port,
                num_api_servers=1,
                log_level="error",
                generate_client_file=False,
                access_log=False,
                server_header=False,
                http=Connection,
                ws="none",
            )
        except KeyboardInterrupt:  # before it has begun
            self.interrupted = True
        except (RuntimeError, EOFError, OSError) as error:
            told = GONE if self.watching else f"the server has not begun: {error}: see above for why."
            self.broken = self.broken or told
        finally:
            self._end_all()
        if self.broken:
            raise UserError(self.broken)
        if self.interrupted and not self.told:
            raise KeyboardInterrupt

    def verify_worker_status(self) -> None:
        """Wait for the first worker.

        Raises:
            RuntimeError: one has ended.
        """
        while not self.ready():
            ended = [w for w in self.begun if not w.is_alive()]
            failed = WorkerSetupStatus.ERROR in self.workers_setup_status.values()
            if ended or failed:
                raise RuntimeError("a worker has ended while it was set up")
            time.sleep(0.05)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Of the process that listens."""
        end_with(self.first, self.manager._process.pid)
        async with super().lifespan(app), self.desk.watching():
            yield

    def _init_manager(self, num_api_servers: int) -> Any:
        with undisturbed():
            self.manager = super()._init_manager(num_api_servers)
        self.api.family = self.first, self.manager._process.pid
        return self.manager

    def launch_inference_worker(self, lit_api: Any) -> Any:
        """As LitServe does; known from the first on, so that one that ends while it is set up is seen."""
        with undisturbed():
            self.begun = super().launch_inference_worker(lit_api)
        return self.begun

    def _start_server(self, port: int, *args: Any, **kwargs: Any) -> dict[int, Any]:
        with undisturbed():
            listening = super()._start_server(port, *args, **kwargs)
        _until_listening(port)
        shown = f"[{self.place.host}]" if ":" in self.place.host else self.place.host
        told = f"serves {self.what}; open it to try, /docs has the addresses"
        print(f"http://{shown}:{port}: {told}", flush=True)
        return listening

    def _start_worker_monitoring(self, manager: Any, uvicorn_workers: dict[int, Any]) -> None:
        """In the place of LitServe's, which looks neither after the process that listens, nor tells it that a
        worker has ended."""
        listening = list(uvicorn_workers.values())
        self.watching = threading.Thread(target=self._watch, args=[listening], daemon=True)
        self.watching.start()

    def _watch(self, listening: list[Any]) -> None:
        since = [time.monotonic()] * len(self.inference_workers)
        try:
            while not self.ending.wait(LOOK):
                if not all(process.is_alive() for process in listening):
                    self.broken = "the process that listens has ended: start the server again."
                    break
                for n, worker in enumerate(self.inference_workers):
                    self._restarted(n, worker, since)
        except (EOFError, OSError):  # which the first thread sees, too
            self.broken = GONE
        if self.broken:
            os.kill(os.getpid(), signal.SIGTERM)

    def _restarted(self, n: int, worker: Any, since: list[float]) -> None:
        """Begin a worker anew when it has ended, and tell the desk."""
        if worker.is_alive():
            return
        status = f"{self.desk.api_path.rpartition('/')[2]}_{n}"
        if self.workers_setup_status[status] != WorkerSetupStatus.FINISHED:
            self.workers_setup_status[status] = WorkerSetupStatus.FINISHED
            self._transport.send(ended(worker.pid), 0)
        if time.monotonic() - since[n] > AGAIN:
            since[n] = time.monotonic()
            with undisturbed():
                self.inference_workers[n] = self.launch_single_inference_worker(self.api, n)

    def _perform_graceful_shutdown(self, manager: Any, uvicorn_workers: Any, reason: str = "normal") -> None:
        self.interrupted |= reason == "keyboard_interrupt"
        self.ending.set()
        if self.watching:
            self.watching.join()  # it may begin a worker now
        super()._perform_graceful_shutdown(manager, uvicorn_workers, reason)

    def _end_all(self) -> None:
        """What LitServe leaves when it ends before it has begun."""
        if self.manager is not None:
            self.manager.shutdown()
        end_children()

    def _told(self, *_: Any) -> None:
        if os.getpid() != self.first:  # uvicorn sends the process that listens the signal again at its end
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough
        self.told = True
        raise KeyboardInterrupt


def free_port(host: str, port: int) -> int:
    """The port, or a free one where it is 0.

    Raises:
        UserError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port={port}: cannot be had ({error.strerror}): give another.") from None
        return int(probe.getsockname()[1])


def _until_listening(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
