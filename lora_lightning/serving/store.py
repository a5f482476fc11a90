"""AdapterStore: the adapters of one base that are in memory, loaded when they are asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_lightning.adapters.bank import Bank
from lora_lightning.adapters.parking import Parked, put_back, take_out
from lora_lightning.errors import AdapterFileError, ConfigError, UserError
from lora_lightning.files.pair import digest_of
from lora_lightning.files.parked import Parking
from lora_lightning.serving.catalog import FILES, Catalog, UnknownAdapter, UnusableAdapter

logger = logging.getLogger(__name__)
MOST = 256  # adapters in memory
AT_WORK = 64  # of these, those that stay in the model between batches
Stamp = tuple[tuple[int, int, int, int], ...]


@dataclass(eq=False)
class Resident:
    """An adapter in memory. Whoever holds it computes with these very numbers, whatever the store does.

    Attributes:
        digest: of its contents, SHA-256.
        facts: what data and task said of themselves, which came with it.
        stamp: of its files, when they were read.
        bytes: of its tensors.
    """

    name: str
    digest: str
    facts: dict[str, Any]
    parked: Parked
    stamp: Stamp
    bytes: int


class FairLock:
    """A lock that is given in the order in which it is asked for, so that who takes it again and again does
    not keep others from it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last, self._now = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._last = self._last, self._last + 1
            self._changed.wait_for(lambda: self._now == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()


class AdapterStore:
    """Adapters of one base by name: read from the catalog's folders when they are first asked for, checked as
    `load_adapter` checks, and kept. A folder whose files are replaced is read again; who has the adapter of
    before keeps it. Removed ones leave, and the one that was not used for the longest time. For several
    threads.

    Args:
        model: the plain base, in eval mode.
        catalog: names and folders.
        most: adapters that are kept.
        pinned: names of those that are read at once and never leave.
        check_base: refuse adapters that were trained on other frozen weights.

    Raises:
        ConfigError: more are pinned than are kept.
        UserError: a pinned one is not there, or cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        catalog: Catalog,
        most: int = MOST,
        pinned: Collection[str] = (),
        check_base: bool = True,
    ) -> None:
        if len(pinned) > most:
            raise ConfigError(
                [f"pinned: {len(pinned)} adapters, and most={most} are kept: give at least as many."]
            )
        self.model, self.catalog, self.most, self.pinned = model, catalog, most, frozenset(pinned)
        self.lock = FairLock()  # of the model
        self._parking, self._bank = Parking(model, check_base), Bank(model)
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._at_work: OrderedDict[str, Parked] = OrderedDict()  # in the model
        self._known = threading.Lock()  # of the two
        self._taking = threading.Lock()  # of the parking
        self._reading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._listed: Mapping[str, Path] = {}  # what of the residents was compared with
        self._unread: dict[str, Stamp] = {}  # files of residents that were replaced by damaged ones
        for name in pinned:
            self.get(name)

    def get(self, name: str) -> Resident:
        """The adapter of this name, as its files are now.

        Raises:
            UnknownAdapter: there is none.
            UnusableAdapter: it is damaged, or of another base.
        """
        try:
            folder = self.catalog.folder(name)
            with self._known:
                reading = self._reading[name]
            with reading:  # who asks meanwhile waits for the same
                found = self._fresh(name, folder)
        except UnknownAdapter:
            with self._known:
                self._residents.pop(name, None)
            raise
        listed = self.catalog.listed()
        with self._known:
            self._residents[name] = found
            self._residents.move_to_end(name)
            self._let_go(listed)
        return found

    @contextlib.contextmanager
    def mixed(self, samples: Sequence[Resident | None]) -> Iterator[None]:
        """Within this context the calling thread alone has the model, in which each sample of a batch has its
        adapter; None is the base."""
        with self.lock:
            adapters = [None if r is None else r.parked for r in samples]
            wanted = {a.name: a for a in adapters if a is not None}
            if not wanted:  # the model as it stands is the base
                yield
                return
            road = self._bank.road(adapters)
            self._put_to_work(wanted if road.splits or len({*adapters}) == 1 else {})
            with road.opened(adapters):  # nobody else has the model: nothing is to be refused
                yield

    def residents(self) -> list[Resident]:
        """Those in memory, the one that was used last at the end."""
        with self._known:
            return list(self._residents.values())

    def _put_to_work(self, wanted: dict[str, Parked]) -> None:
        """Put adapters into the model; those that have not been used for the longest time are taken out."""
        for name, parked in wanted.items():
            if name not in self._at_work:
                put_back(self.model, parked)
            self._at_work[name] = parked
            self._at_work.move_to_end(name)
        kept = {id(r.parked) for r in self.residents()} | {id(p) for p in wanted.values()}
        room = max(AT_WORK, len(wanted))
        for i, (name, parked) in enumerate(reversed(list(self._at_work.items()))):
            if i >= room or id(parked) not in kept:
                take_out(self.model, self._at_work.pop(name))

    def _fresh(self, name: str, folder: Path) -> Resident:
        """The resident, or what is read anew where its files are others since."""
        with self._known:
            present = self._residents.get(name)
        stamp = _stamp(folder)
        if not stamp and self.catalog.gone(name, folder):
            raise _removed(name)  # what is in memory may be older than what was removed
        if present is not None and stamp in (present.stamp, self._unread.get(name)):
            return present
        try:
            found = self._read(name, folder, stamp, present)
            self._unread.pop(name, None)
            return found
        except UserError as error:
            logger.warning("adapter %s: %s", name, error)
            if not _stamp(folder) and self.catalog.gone(name, folder):  # while it was read
                raise _removed(name) from None
            if present is None:
                raise UnusableAdapter(
                    f"adapter={name}: cannot be used: it is damaged, or of another base. The server's log "
                    "says more."
                ) from None
            self._unread[name] = stamp  # the one of before stays, until the files are others again
            return present

    def _read(self, name: str, folder: Path, stamp: Stamp, present: Resident | None) -> Resident:
        if not stamp:
            raise AdapterFileError(f"{folder} holds no adapter any more. Give another, or save it again.")
        read = self._parking.read(folder)
        digest = digest_of(read.saved.description(), read.saved.tensors)
        if present is not None and present.digest == digest:
            present.stamp = stamp
            return present
        with self._taking:
            parked = self._parking.take(read, within=self.lock)
        return Resident(name, digest, read.facts, parked, stamp, parked.bytes())

    def _let_go(self, listed: Mapping[str, Path]) -> None:
        """Drop the ones that were removed, and of the others those used the longest ago, to keep `most`."""
        if listed is not self._listed:
            self._listed = listed
            for name in self._residents.keys() - listed.keys():
                del self._residents[name]
        surplus = len(self._residents) - self.most
        if surplus > 0:
            for name in [n for n in self._residents if n not in self.pinned][:surplus]:
                del self._residents[name]


def _removed(name: str) -> UnknownAdapter:
    return UnknownAdapter(f"adapter={name}: there is none of this name any more.")


def _stamp(folder: Path) -> Stamp:
    """What changes when other files take the places of an adapter's, also such as kept the time of a copy;
    empty where they are gone."""
    try:
        stats = [os.stat(folder / name) for name in FILES]
    except OSError:
        return ()
    return tuple((s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for s in stats)
