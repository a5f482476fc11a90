"""Files fetched by their address, if that is possible; offline is noticed within seconds."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import torch

from lora_lightning.errors import MissingFileError
from lora_lightning.utils.atomic import write_whole
from lora_lightning.utils.progress import Bar

DOWNLOAD_AGAIN = "Delete it and download it again."
BLOCK = 1 << 18  # bytes read at once
PROBE_SECONDS = 3.0  # the server answers a HEAD request within this time, or we are offline


def url_file(name: str, url: str, cache_dir: str | None = None) -> Path:
    """The weights of a model at an address: from torch's cache, else downloaded, else one error at once.

    Args:
        name: of the model, for the error.
        url: of the file.
        cache_dir: in place of torch's cache (TORCH_HOME).

    Raises:
        MissingFileError: they are not here and cannot be had now.
    """
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints").absolute()
    path = folder / Path(urlparse(url).path).name
    if path.is_file():
        return path
    reason = url_failure(url)
    if reason is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, path)
            return path
        except OSError as error:
            reason = failure_text(error)
    raise MissingFileError(
        f"The pretrained weights of {name} are not on this machine, and cannot be downloaded now"
        f" ({reason}).\n"
        f"  file:       {path.name} from {url}\n"
        f"  looked for: {path} (TORCH_HOME sets another cache)\n"
        f"  to get it:  on a machine with internet, curl -LO {url}\n"
        f"  then:       copy it here as {path}"
    )


def _fetch(url: str, path: Path) -> None:
    """Write what is at an address into a file, whole or not at all.

    Raises:
        OSError: it cannot be read or written, or ends before its length.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "lora_lightning"})
    with urllib.request.urlopen(request) as answer:
        size = answer.length

        def write(temporary: str) -> None:
            got = 0
            with open(temporary, "wb") as file, megabytes(path.name, size) as bar:
                while block := answer.read(BLOCK):
                    got += file.write(block)
                    bar.advance(len(block) / 1e6)
            if size is not None and got != size:
                raise OSError(f"the connection was cut off after {got:,} of {size:,} bytes")

        write_whole(path, write)


def megabytes(name: str, size: int | None) -> Bar:
    """The bar of a download of so many bytes."""
    return Bar(f"downloading {name}", None if size is None else size / 1e6, "MB")


def url_failure(url: str) -> str | None:
    """Why an address cannot be read now, None if it can."""
    request = urllib.request.Request(url, method="HEAD")
    return request_failure(lambda: urllib.request.urlopen(request, timeout=PROBE_SECONDS).close())


def request_failure(probe: Callable[[], object]) -> str | None:
    """Why a network request fails, None if it succeeds; decided in 2 * PROBE_SECONDS.

    It runs in a thread of its own, since looking up a host name has no timeout.
    """
    reasons = [f"no answer within {PROBE_SECONDS:g} s"]

    def run() -> None:
        try:
            probe()
            reasons.clear()
        except Exception as error:  # requests, httpx or the hub's own, by version
            reasons[:] = [failure_text(error)]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * PROBE_SECONDS)
    return reasons[0] if reasons else None


def failure_text(error: Exception) -> str:
    """The error's own message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
