"""Engine: takes uploads, and answers those for different adapters of one base in shared batches."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from lora_lightning.errors import UserError
from lora_lightning.serving.asking import ABOUT, Ask, Event, Tell
from lora_lightning.serving.catalog import UnknownAdapter, UnusableAdapter
from lora_lightning.serving.inputs import BadUpload, is_large
from lora_lightning.serving.kinds import Facts, Kind, Work
from lora_lightning.serving.store import AdapterStore, Resident
from lora_lightning.serving.turns import Turns

logger = logging.getLogger(__name__)
READERS = 2  # threads that decode uploads and encode answers, and as many for large uploads


@dataclass(eq=False)
class _Job:
    """A request in work."""

    ask: Ask
    tell: Tell
    resident: Resident | None
    work: Work
    outputs: list[Any]
    missing: int
    batch: int = 0
    failed: bool = False


class Engine:
    """Answers requests. A few threads decode and encode, one has the model.

    Args:
        kind: what is answered.
        store: of the adapters.
        facts: of the base.
        batch: units of a batch at most.
        max_wait_ms: how long one waits for others to share its batch.
    """

    def __init__(
        self, kind: Kind, store: AdapterStore, facts: Facts, batch: int = 8, max_wait_ms: float = 5.0
    ) -> None:
        self.kind, self.store, self.facts = kind, store, facts
        self.turns: Turns[tuple[_Job, int]] = Turns(batch, max_wait_ms / 1000)
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._large = ThreadPoolExecutor(READERS, "large")  # decoding takes seconds: not before all others
        self._thread = threading.Thread(target=self._batches, name="model", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, tell: Tell) -> None:
        """Take a request; `tell` is called from other threads, the last time with "answer" or "error"."""
        lane = self._large if is_large(ask.body) else self._readers
        lane.submit(self._begin, ask, tell)

    def close(self) -> None:
        """Answer what was taken, and take no more."""
        decoding = self._readers, self._large
        self._readers = ThreadPoolExecutor(READERS, "reader")  # encodes meanwhile
        for lane in decoding:
            lane.shutdown()  # what is decoded now gets into the turns
        self.turns.close()
        self._thread.join()
        self._readers.shutdown()

    def _begin(self, ask: Ask, tell: Tell) -> None:
        try:
            if _over(ask):
                return tell(_late())
            if ask.kind == ABOUT:
                return tell(Event("answer", {"kind": self.kind.name}))
            if ask.kind != self.kind.name:
                raise BadUpload(404, f"this server does not {ask.kind}: use /v1/{self.kind.name}.")
            resident = None if ask.adapter is None else self.store.get(ask.adapter)
            facts = {**self.facts, **(resident.facts if resident else {})}
            work = self.kind.prepare(ask.body, facts, ask.options)
            job = _Job(ask, tell, resident, work, [None] * len(work.units), len(work.units))
            if not work.units:  # silence
                return self._end(job)
            for i, (shape, _) in enumerate(work.units):
                self.turns.put(ask.adapter or "", shape, (job, i))
        except Exception as error:
            tell(_error(error))

    def _batches(self) -> None:
        while batch := self.turns.take():
            batch = [(job, i) for job, i in batch if self._wanted(job)]
            if batch:
                self._run(batch)

    def _wanted(self, job: _Job) -> bool:
        if not job.failed and _over(job.ask):
            self._fail(job, _late())
        return not job.failed

    def _run(self, batch: list[tuple[_Job, int]]) -> None:
        try:
            try:
                outputs = self._outputs(batch)
            except UserError:  # a layer in which the samples cannot be told: each adapter by itself
                outputs = self._apart(batch)
        except Exception as error:
            for job, _ in batch:
                self._fail(job, _error(error))
            return
        for (job, i), output in zip(batch, outputs, strict=True):
            job.outputs[i], job.batch = output, max(job.batch, len(batch))
            job.missing -= 1
        for job in dict.fromkeys(job for job, _ in batch):
            if job.failed:
                continue
            if job.work.part is not None:
                for part in job.work.part():
                    job.tell(Event("part", part))
            if not job.missing:
                self._readers.submit(self._end, job)

    def _outputs(self, batch: list[tuple[_Job, int]]) -> list[Any]:
        with self.store.mixed([job.resident for job, _ in batch]), torch.inference_mode():
            return self.kind.run([job.work.units[i][1] for job, i in batch])

    def _apart(self, batch: list[tuple[_Job, int]]) -> list[Any]:
        found: dict[int, Any] = {}
        for resident in dict.fromkeys(job.resident for job, _ in batch):
            mine = [n for n, (job, _) in enumerate(batch) if job.resident is resident]
            found.update(zip(mine, self._outputs([batch[n] for n in mine]), strict=True))
        return [found[n] for n in range(len(batch))]

    def _end(self, job: _Job) -> None:
        try:
            told = {"adapter": job.ask.adapter, **job.work.answer(job.outputs)}
            job.tell(Event("answer", told, batch=job.batch))
        except Exception as error:
            self._fail(job, _error(error))

    @staticmethod
    def _fail(job: _Job, event: Event) -> None:
        if not job.failed:
            job.failed = True
            job.tell(event)


def _over(ask: Ask) -> bool:
    return ask.until is not None and time.monotonic() > ask.until


def _late() -> Event:
    return Event("error", {"message": "the answer took too long: try again later."}, 504)


def _error(error: Exception) -> Event:
    if isinstance(error, BadUpload):
        return Event("error", {"message": str(error)}, error.status)
    if isinstance(error, UnknownAdapter):
        return Event("error", {"message": str(error)}, 404)
    if isinstance(error, UnusableAdapter):
        return Event("error", {"message": str(error)}, 503)
    logger.error("a request failed", exc_info=error)
    return Event("error", {"message": "the server has made a mistake; its log says more."}, 500)
