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

VERDICTS = ("HIT", "MISS", "JOINED", "REVALIDATED", "STALE", "PASS", "-")
"""What may become of a request, in the words of the access log."""

_CODES = ("other", "1xx", "2xx", "3xx", "4xx", "5xx")  # the first where the client left before there was an answer
_BYTES, _MICROSECONDS = len(_CODES), len(_CODES) + 1  # the places of sums, after those of the codes
_OF_VERDICT = len(_CODES) + 2  # numbers
_PLACES = {verdict: place * _OF_VERDICT for place, verdict in enumerate(VERDICTS)}
_OF_PROCESS = _OF_VERDICT * len(VERDICTS)
_SIZE = 8  # bytes of a number: it is written, or read, whole


@frozen
class Metrics:
    """The numbers of several processes, of whom the others are copies of the one that made this.

    Each counts with what is `of` its number, and may tell what all have counted.
    """

    _numbers: memoryview
    _start: int = 0  # of those that this process writes

    @classmethod
    def make(cls, processes: int) -> Metrics:
        """Return metrics of which nothing has been counted yet."""
        return cls(memoryview(mmap.mmap(-1, _SIZE * _OF_PROCESS * processes)).cast("Q"))

    def of(self, process: int) -> Metrics:
        """Return what the process of that number counts with."""
        return Metrics(self._numbers, process * _OF_PROCESS)

    def count(self, verdict: str, status: int, size: int, seconds: float) -> None:
        """Count a request that is over; `size` is in bytes."""
        start, code = self._start + _PLACES[verdict], status // 100
        self._numbers[start + (code if code < len(_CODES) else 0)] += 1
        self._numbers[start + _BYTES] += size
        self._numbers[start + _MICROSECONDS] += int(seconds * 1_000_000)

    def tell(self, gauges: Iterable[tuple[str, str, float]] = ()) -> bytes:
        """Return all in Prometheus's text format; `gauges` are a name, what it is, and its value now."""
        lines: list[str] = []
        seconds = ((labels, micros / 1_000_000) for labels, micros in self._sums(_MICROSECONDS))
        for name, meaning, samples in (
            ("requests_total", "Requests that are over, by what became of them.", self._requests()),
            ("sent_bytes_total", "Bytes of bodies that clients were sent.", self._sums(_BYTES)),
            ("request_seconds_total", "Seconds from the heads of requests to the ends of their answers.", seconds),
        ):
            lines += _headed(name, meaning, "counter")
            lines += (f"dockerproxy_{name}{{{labels}}} {value}" for labels, value in samples)
        for name, meaning, value in gauges:
            lines += [*_headed(name, meaning, "gauge"), f"dockerproxy_{name} {value}"]
        return "".join(f"{line}\n" for line in lines).encode()

    def _requests(self) -> Iterator[tuple[str, float]]:
        for place, code in enumerate(_CODES):
            yield from ((f'{labels},code="{code}"', count) for labels, count in self._sums(place))

    def _sums(self, place: int) -> Iterator[tuple[str, int]]:
        """Yield labels, and the sum over all processes of the number at `place`, for each verdict."""
        for verdict, start in _PLACES.items():
            numbers = self._numbers[start + place :: _OF_PROCESS]
            yield f'verdict="{verdict}"', sum(numbers)


def _headed(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP dockerproxy_{name} {meaning}", f"# TYPE dockerproxy_{name} {kind}"]
