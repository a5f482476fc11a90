"""What a server counts of itself, in the text that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """Counts values by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        total, lines = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """Of one server.

    Attributes:
        workers: what each worker has told last: adapters in memory and their bytes, by its process.
    """

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds, self.batches = Histogram(SECONDS), Histogram(SIZES)
        self.workers: dict[int, Mapping[str, int]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request came to its end."""
        self.requests[route, status] += 1
        self.seconds.add(seconds)

    def text(self, inside: int) -> str:
        """All of it.

        Args:
            inside: requests that are not answered yet.
        """
        lines = [
            "# HELP lora_requests_total Requests that were answered.",
            "# TYPE lora_requests_total counter",
        ]
        lines += [
            f'lora_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        for name, about, histogram in (
            ("lora_request_seconds", "From the first byte to the answer.", self.seconds),
            ("lora_batch_size", "Uploads and parts of sounds that ran together.", self.batches),
        ):
            lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram", *histogram.lines(name)]
        gauges = {
            "lora_requests_inside": ("Requests that are not answered yet.", {"": inside}),
            "lora_adapters_in_memory": ("Of each worker.", self._told("adapters")),
            "lora_adapter_bytes": ("Of their tensors.", self._told("bytes")),
        }
        for name, (about, values) in gauges.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} gauge"]
            lines += [f"{name}{labels} {value}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"

    def _told(self, what: str) -> dict[str, int]:
        return {f'{{worker="{worker}"}}': told[what] for worker, told in sorted(self.workers.items())}
