"""What the daemon has done, in numbers for Prometheus.

Each process counts for itself, in memory that all of them share, and whichever is asked tells the sums. A process that
takes the place of one that died goes on with its numbers: a counter never decreases while the daemon runs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator

from attrs import frozen

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of Prometheus's text format (prometheus.io/docs/instrumenting/exposition_formats)."""

CACHE_STATUSES = ("HIT", "MISS", "JOINED", "REVALIDATED", "STALE", "PASS", "-")
"""What may become of a request, in the words of the access log."""

_STATUS_CLASSES = (
    "other",
    "1xx",
    "2xx",
    "3xx",
    "4xx",
    "5xx",
)  # the first where the client left before there was an answer
_BYTES, _MICROSECONDS = len(_STATUS_CLASSES), len(_STATUS_CLASSES) + 1  # the places of sums, after those of the codes
_COUNTERS_PER_STATUS = len(_STATUS_CLASSES) + 2  # numbers
_OFFSETS = {cache_status: index * _COUNTERS_PER_STATUS for index, cache_status in enumerate(CACHE_STATUSES)}
_COUNTERS_PER_PROCESS = _COUNTERS_PER_STATUS * len(CACHE_STATUSES)
_COUNTER_SIZE = 8  # bytes of a number: it is written, or read, whole


@frozen
class Metrics:
    """The numbers of several processes, of whom the others are copies of the one that made this.

    Each counts with what is `of` its number, and may tell what all have counted.
    """

    _counters: memoryview
    _offset: int = 0  # of those that this process writes

    @classmethod
    def make(cls, processes: int) -> Metrics:
        """Return metrics of which nothing has been counted yet."""
        return cls(memoryview(mmap.mmap(-1, _COUNTER_SIZE * _COUNTERS_PER_PROCESS * processes)).cast("Q"))

    def for_process(self, process: int) -> Metrics:
        """Return what the process of that number counts with."""
        return Metrics(self._counters, process * _COUNTERS_PER_PROCESS)

    def count(self, cache_status: str, status: int, size: int, seconds: float) -> None:
        """Count a request that is over; `size` is in bytes."""
        offset, status_class = self._offset + _OFFSETS[cache_status], status // 100
        self._counters[offset + (status_class if status_class < len(_STATUS_CLASSES) else 0)] += 1
        self._counters[offset + _BYTES] += size
        self._counters[offset + _MICROSECONDS] += int(seconds * 1_000_000)

    def render(self, gauges: Iterable[tuple[str, str, float]] = ()) -> bytes:
        """Return all in Prometheus's text format; `gauges` are a name, what it is, and its value now."""
        lines: list[str] = []
        seconds = ((labels, microseconds / 1_000_000) for labels, microseconds in self._sums(_MICROSECONDS))
        for name, help_text, samples in (
            ("requests_total", "Requests that are over, by what became of them.", self._requests()),
            ("sent_bytes_total", "Bytes of bodies that clients were sent.", self._sums(_BYTES)),
            ("request_seconds_total", "Seconds from the heads of requests to the ends of their answers.", seconds),
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
        """Yield labels, and the sum over all processes of the number at `place`, for each verdict."""
        for cache_status, offset in _OFFSETS.items():
            values = self._counters[offset + counter :: _COUNTERS_PER_PROCESS]
            yield f'verdict="{cache_status}"', sum(values)


def _metadata(name: str, help_text: str, metric_type: str) -> list[str]:
    return [f"# HELP dockerproxy_{name} {help_text}", f"# TYPE dockerproxy_{name} {metric_type}"]
