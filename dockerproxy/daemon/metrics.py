"""Prometheus metrics of all processes, in shared memory.

Each process increments its own counters, and any process can render the sums. A worker that replaces a dead one
continues with its counters, so a counter never decreases while the daemon runs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator

from attrs import frozen

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Media type of Prometheus's text format (prometheus.io/docs/instrumenting/exposition_formats)."""

CACHE_STATUSES = ("HIT", "MISS", "JOINED", "REVALIDATED", "STALE", "PASS", "-")
"""Values of the label `verdict`, as in the access log."""

# "other" counts clients that disconnected before the response, and statuses outside 100..599.
_STATUS_CLASSES = ("other", "1xx", "2xx", "3xx", "4xx", "5xx")
_BYTES, _MICROSECONDS = len(_STATUS_CLASSES), len(_STATUS_CLASSES) + 1  # indices of the two sums, behind the classes
_COUNTERS_PER_STATUS = len(_STATUS_CLASSES) + 2
_OFFSETS = {cache_status: index * _COUNTERS_PER_STATUS for index, cache_status in enumerate(CACHE_STATUSES)}
_COUNTERS_PER_PROCESS = _COUNTERS_PER_STATUS * len(CACHE_STATUSES)
_COUNTER_SIZE = 8  # bytes; an aligned 64-bit word is read and written atomically


@frozen
class Metrics:
    """Counters in an anonymous shared mapping that forked processes inherit.

    Each process counts with its own `for_process(index)`, and can render the totals of all.
    """

    _counters: memoryview
    _offset: int = 0  # index of this process's first counter

    @classmethod
    def make(cls, processes: int) -> Metrics:
        """Return metrics for that many processes, all zero."""
        return cls(memoryview(mmap.mmap(-1, _COUNTER_SIZE * _COUNTERS_PER_PROCESS * processes)).cast("Q"))

    def for_process(self, process: int) -> Metrics:
        """Return a view that counts for the process with index `process`."""
        return Metrics(self._counters, process * _COUNTERS_PER_PROCESS)

    def count(self, cache_status: str, status: int, size: int, seconds: float) -> None:
        """Count a finished request that sent `size` bytes of body. `status` is 0 if no response was sent."""
        offset, status_class = self._offset + _OFFSETS[cache_status], status // 100
        self._counters[offset + (status_class if status_class < len(_STATUS_CLASSES) else 0)] += 1
        self._counters[offset + _BYTES] += size
        self._counters[offset + _MICROSECONDS] += int(seconds * 1_000_000)

    def render(self, gauges: Iterable[tuple[str, str, float]] = ()) -> bytes:
        """Return all metrics in Prometheus's text format. `gauges` are (name, help text, value)."""
        lines: list[str] = []
        seconds = ((labels, microseconds / 1_000_000) for labels, microseconds in self._sums(_MICROSECONDS))
        for name, help_text, samples in (
            ("requests_total", "Finished requests by cache status and status class.", self._requests()),
            ("sent_bytes_total", "Bytes of response bodies sent to clients.", self._sums(_BYTES)),
            ("request_seconds_total", "Seconds from the request's head to the end of the response.", seconds),
        ):
            lines += _metadata(name, help_text, "counter")
            lines += (f"dockerproxy_{name}{{{labels}}} {value}" for labels, value in samples)
        for name, help_text, value in gauges:
            lines += [*_metadata(name, help_text, "gauge"), f"dockerproxy_{name} {value}"]
        return "".join(f"{line}\n" for line in lines).encode()

    def _requests(self) -> Iterator[tuple[str, float]]:
        for counter, code in enumerate(_STATUS_CLASSES):
            yield from ((f'{labels},code="{code}"', count) for labels, count in self._sums(counter))

    def _sums(self, counter: int) -> Iterator[tuple[str, int]]:
        """Yield each cache status as a label, with the sum of `counter` over all processes."""
        for cache_status, offset in _OFFSETS.items():
            values = self._counters[offset + counter :: _COUNTERS_PER_PROCESS]
            yield f'verdict="{cache_status}"', sum(values)


def _metadata(name: str, help_text: str, metric_type: str) -> list[str]:
    return [f"# HELP dockerproxy_{name} {help_text}", f"# TYPE dockerproxy_{name} {metric_type}"]
