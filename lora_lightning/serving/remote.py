"""Adapters in an object store, or behind any address that fsspec knows: copied when they are asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from functools import partial
from pathlib import Path
from typing import Any

from lora_lightning.data.stream_sources import files_of
from lora_lightning.errors import UserError
from lora_lightning.serving.catalog import FILES, IN_RUN, LEAST, NAME, Catalog, UnusableAdapter, logger
from lora_lightning.utils.atomic import make_folder, write_together, write_whole
from lora_lightning.utils.mapping_file import LARGEST

LIMITS = dict(zip(FILES, (LARGEST, 4 * 2**30), strict=True))  # bytes
SLOWER = 10  # times as long as of a folder on this machine is taken as it was what was listed, and a copy
WAIT = 30.0  # seconds for a copy that is not there yet
LISTING = 5.0  # seconds for a new list, where a name is unknown
COPIERS = 4  # threads
PIECE = 2**20  # bytes read at once
KEPT = 60.0  # seconds for which a copy stays though the store has it no more
MARK = "mark.json"  # beside a copy: of which state of the store it is
SAID = ("ETag", "etag", "md5", "Content-MD5", "LastModified", "last_modified", "mtime", "updated", "created")


class RemoteCatalog(Catalog):
    """The sub-folders of an address, as they were seconds ago. Nobody waits for the store but who asks for an
    adapter of which there is no copy yet; while the store is away, what is here is served.

    Args:
        address: as `s3://bucket/shelf`; its options, such as an endpoint, are fsspec's own (`FSSPEC_S3_…`).
        cache: where the copies are kept; None is a folder of the user's.

    Raises:
        UserError: nothing knows such an address, or it cannot be read.
    """

    def __init__(self, address: str, cache: Path | None = None) -> None:
        super().__init__()
        self.address, key = address, hashlib.sha256(address.encode()).hexdigest()[:16]
        self.cache = cache or _caches() / key
        self._files: tuple[int, Any] | None = None  # the process, and its file system: none outlives a fork
        self._places: dict[str, str] = {}
        self._listing: threading.Thread | None = None
        self._copiers: ThreadPoolExecutor | None = None
        self._copies: dict[str, Future[None]] = {}
        self._copied: dict[str, float] = {}  # when a copy was compared last
        try:
            self._found = self._listed()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"adapters={address}: cannot be read ({type(error).__name__}: {_line(error)}): give an "
                "address that this machine may list."
            ) from None
        self._at = time.monotonic()

    def folder(self, name: str) -> Path:
        """The copy of an adapter.

        Raises:
            UnknownAdapter: no name, or there is none of this name.
            UnusableAdapter: it cannot be had now.
        """
        place = super().folder(name)
        here = (place / FILES[0]).is_file()
        with self._lock:
            copy, since = self._copies.get(name), time.monotonic() - self._copied.get(name, -1e9)
            if (since >= SLOWER or not here) and (copy is None or copy.done()):
                self._copied[name] = time.monotonic()
                self._copiers = self._copiers or ThreadPoolExecutor(COPIERS, "copier")
                copy = self._copies[name] = self._copiers.submit(self._copy, name, place)
        if not here:
            try:
                assert copy is not None
                copy.result(WAIT)
            except LateError:
                raise UnusableAdapter(f"adapter={name}: is not here yet: try again later.") from None
            except Exception:
                self._copied.pop(name, None)
                raise UnusableAdapter(
                    f"adapter={name}: cannot be had from its store now: try again later. The server's log "
                    "says more."
                ) from None
        return place

    def _now(self, fresh: float) -> dict[str, Path]:
        with self._lock:
            idle = self._listing is None or not self._listing.is_alive()
            if idle and time.monotonic() - self._at >= fresh * SLOWER:
                self._at = time.monotonic()
                self._listing = threading.Thread(target=self._list, daemon=True)
                self._listing.start()
        return self._found

    def _awaited(self) -> bool:
        for _ in range(2):  # the first may have begun before what is asked for came
            if self._listing is None:
                return False
            self._listing.join(LISTING)
            self._now(LEAST)
        return True

    def _list(self) -> None:
        try:
            self._found = self._listed()
        except Exception as error:  # of whatever library; what was read before stays
            logger.warning("adapters=%s: cannot be read now: %s", self.address, _line(error))

    def _listed(self) -> dict[str, Path]:
        files, root = self._opened()
        with contextlib.suppress(AttributeError):
            files.invalidate_cache()
        if not files.exists(root):
            raise UserError(f"adapters={self.address}: there is nothing there: give what there is.")
        places: dict[str, str] = {}
        for path in _paths(files, root):
            inside = path[len(root) + 1 :].split("/")
            if inside[1:] in ([FILES[0]], [IN_RUN, FILES[0]]) and NAME.fullmatch(inside[0]):
                places[inside[0]] = path.rpartition("/")[0]
        self._places = places
        self._forget(places)
        return self._without_base({name: self.cache / name for name in places}, self.address)

    def _forget(self, places: Collection[str]) -> None:
        """Delete copies of what the store has no more; not one that another process may be making now."""
        with contextlib.suppress(OSError):  # nothing was copied yet
            for copy in self.cache.iterdir():
                if copy.name not in places and time.time() - copy.stat().st_mtime > KEPT:
                    shutil.rmtree(copy, ignore_errors=True)

    def _opened(self) -> tuple[Any, str]:
        if self._files is None or self._files[0] != os.getpid():
            self._files = os.getpid(), files_of("adapters", self.address)
        files = self._files[1]
        return files, str(files._strip_protocol(self.address)).rstrip("/")

    def _copy(self, name: str, place: Path) -> None:
        """Copy both files when the store's are others than those that are here."""
        try:
            files, there = self._opened()[0], self._places[name]
            mark = {one: _mark(files.info(f"{there}/{one}")) for one in FILES}
            if mark == _read_mark(place) and all((place / one).is_file() for one in FILES):
                return
            for one, (size, _) in mark.items():
                if size is not None and not 0 < size <= LIMITS[one]:
                    raise OSError(f"{one} has {size:,} bytes; 1 to {LIMITS[one]:,} are copied.")
            make_folder(place)
            (place / MARK).unlink(missing_ok=True)
            write_together(
                {
                    place / one: partial(_fetch, files, f"{there}/{one}", LIMITS[one], mark[one][0])
                    for one in reversed(FILES)
                }
            )
            write_whole(place / MARK, lambda path: Path(path).write_text(json.dumps(mark)))
        except Exception as error:  # of whatever library
            logger.warning("adapter %s: cannot be copied from its store: %s", name, _line(error))
            raise


def _paths(files: Any, root: str) -> Iterator[str]:
    """Files of a folder and its sub-folders; of a link to a folder, which none follows, an adapter's."""
    for path, info in files.find(root, maxdepth=3, detail=True).items():
        yield path
        if info.get("islink"):
            inside = (f"{path}/{name}" for name in (FILES[0], f"{IN_RUN}/{FILES[0]}"))
            yield from filter(files.exists, inside)


def _fetch(files: Any, source: str, most: int, size: int | None, path: str) -> None:
    """Copy one file, no more of it than is allowed and all that its store says.

    Raises:
        OSError: it is another size.
    """
    count = 0
    with files.open(source, "rb") as there, open(path, "wb") as here:
        while piece := there.read(PIECE):
            count += len(piece)
            if count > most:
                raise OSError(f"{source} has more than {most:,} bytes: nothing was kept.")
            here.write(piece)
    if size is not None and count != size:
        raise OSError(f"{source} came with {count:,} bytes in place of {size:,}: nothing was kept.")


def _mark(info: Mapping[str, Any]) -> list[Any]:
    """Size, and what a store says of the contents or of when they were written."""
    return [info.get("size"), {one: str(info[one]) for one in SAID if info.get(one)}]


def _read_mark(place: Path) -> Any:
    try:
        return json.loads((place / MARK).read_text())
    except (OSError, ValueError):
        return None


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_lightning" / "shelves"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
