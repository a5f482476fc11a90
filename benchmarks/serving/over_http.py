"""Servers in processes of their own, clients that ask them, and what they take of memory."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.serving.load import Load

LITTLE = 40e6  # bytes


def serve(shape: str, folder: str, way: str, adapters: int) -> None:
    """Run a server of this library until it is ended."""
    from lora_lightning.serving.catalog import Catalog
    from lora_lightning.serving.routes import Manners
    from lora_lightning.serving.server import Place, Server

    build = partial(built, shape, folder, way, adapters)
    place = Place(port=0, accelerator="cpu", threads=1, queue=256)
    Server(build, Catalog(Path(folder)), place, Manners(timeout=300.0), f"{way} {shape}").serve()


def built(shape: str, folder: str, way: str, adapters: int, device: str) -> Any:
    """The engine of a worker."""
    import torch

    from benchmarks.serving import ways
    from benchmarks.serving.shelves import SHAPES

    torch.set_num_threads(1)
    make: Any = {"mixed": ways.mixed, "switching": ways.switching}[way]
    return make(SHAPES[shape], Path(folder), adapters)


@dataclass
class Running:
    """A server."""

    address: str
    process: subprocess.Popen[str]

    def memory(self) -> dict[int, int]:
        """Bytes of each process of the server; of those that hold little there are many."""
        found, waiting = {}, [self.process.pid]
        while waiting:
            one = waiting.pop()
            with contextlib.suppress(OSError):
                found[one] = rss(one)
                for task in Path(f"/proc/{one}/task").iterdir():
                    waiting += map(int, (task / "children").read_text().split())
        return {process: size for process, size in found.items() if size > LITTLE}


@contextlib.contextmanager
def server(shape: str, folder: Path, way: str = "mixed", adapters: int = 100) -> Iterator[Running]:
    """A server that answers, ended at the end."""
    given = f"{shape!r}, {str(folder)!r}, {way!r}, {adapters}"
    code = f"from benchmarks.serving.over_http import serve; serve({given})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("http"):
            raise RuntimeError(f"the server of {shape} has not begun")
        address = line.partition(": serves")[0]
        yield Running(address, process)
    finally:
        process.terminate()
        process.wait(60)


class Client:
    """One connection that stays."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=300)

    def ask(self, task: str, adapter: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and the answer."""
        self.connection.request("POST", f"/v1/{task}?adapter={adapter}", body)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())


def drive_http(
    addresses: Sequence[str], task: str, names: Sequence[str], bodies: Sequence[bytes], clients: int
) -> Load:
    """Ask servers, one after the other in turn, as `load.drive` asks an engine.

    Raises:
        RuntimeError: an answer is an error.
    """
    waiting, lock = count(), threading.Lock()
    latencies: list[float] = []
    errors: list[Any] = []

    def run(number: int) -> None:
        client = Client(addresses[number % len(addresses)])
        while True:
            with lock:
                n = next(waiting)
            if n >= len(names):
                return
            begun = time.perf_counter()
            status, answer = client.ask(task, names[n], bodies[n % len(bodies)])
            with lock:
                latencies.append(time.perf_counter() - begun)
                if status != 200:
                    errors.append(answer)

    threads = [threading.Thread(target=run, args=[number]) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    seconds = time.perf_counter() - start
    return Load(seconds, latencies, seconds)


def rss(process: int | str) -> int:
    """Bytes of a process that are in memory."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return 1024 * int(line.split()[1])
    return 0
