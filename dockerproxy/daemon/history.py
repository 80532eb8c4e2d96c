"""Numbers over time: the traffic of the last two years, in all and for each registry, in ring files.

The main process adds the growth of the counters (`Metrics`) to the current row of three rings every ten seconds. There
is no database: the files have a fixed size, survive restarts, and whatever is wrong with them never stops the daemon.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Any
from urllib.parse import quote

from attrs import define, field, frozen
from twisted.application.internet import TimerService
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.daemon.metrics import (
    BUCKETS,
    HOSTED,
    OWN,
    RECEIVED_BYTES,
    REQUEST_SECONDS,
    REQUESTS,
    RESPONSES,
    SENT_BYTES,
    UPSTREAM_FAILURES,
    UPSTREAM_REQUESTS,
    UPSTREAM_SECONDS,
    Metrics,
)
from dockerproxy.daemon.rings import RingFile

SAMPLE_INTERVAL = 10.0
"""Seconds between two samples of the counters."""

ALL = ""
"""The name of the sum over all registries."""

MAX_BARS = 48
"""Bars of a sparkline."""

_HOUR, _DAY = 3600, 86400
_RINGS = {"10s": (10, 6 * 360), "5min": (300, 14 * 288), "1h": (_HOUR, 2 * 365 * 24)}
_OF_REGISTRIES = ("5min", "1h")
_MAX_REGISTRIES = 256  # that have files; beyond that, only the sum counts them
_WARN_INTERVAL = 600.0  # seconds between two lines about a disk that takes no numbers
_KEPT = 10.0  # seconds for which sums are not computed again
_PAUSE = 0.002  # seconds after the numbers of each registry: requests of clients need the interpreter

_COUNTS = len(BUCKETS) + 1
_CODES_PER_WORD = 8
_RATE = 16  # counts below it are exact; of larger ones, the first four bits

log = Logger()


@frozen
class Range:
    """A span of time, as pages offer it, in bins of `step` seconds. Each has one or more rows of the ring `ring`."""

    seconds: int
    ring: str
    step: int


RANGES = {
    "1h": Range(_HOUR, "10s", 10),
    "6h": Range(6 * _HOUR, "10s", 60),
    "24h": Range(_DAY, "5min", 300),
    "7d": Range(7 * _DAY, "5min", 1800),
    "30d": Range(30 * _DAY, "1h", 2 * _HOUR),
    "1y": Range(365 * _DAY, "1h", _DAY),
}


@define
class Numbers:
    """The numbers of a span of time. `served` and `downloaded` are bytes, `latencies` the counts of `BUCKETS`.

    `served` has the bodies of all responses to clients, `downloaded` those of registries. `errors` are requests to
    registries that failed, and requests to the hosted registry that ended with 5xx. `latencies` are those of
    registries, or of the hosted one.
    """

    requests: int = 0
    served: int = 0
    downloaded: int = 0
    errors: int = 0
    stale: int = 0
    latencies: list[int] = field(factory=lambda: [0] * _COUNTS)

    def add(self, other: Numbers, sign: int = 1) -> None:
        """Add `other`, or subtract it."""
        self.requests += sign * other.requests
        self.served += sign * other.served
        self.downloaded += sign * other.downloaded
        self.errors += sign * other.errors
        self.stale += sign * other.stale
        self.latencies = [mine + sign * theirs for mine, theirs in zip(self.latencies, other.latencies, strict=True)]

    def add_row(self, values: Sequence[int], *, with_latencies: bool = True) -> None:
        """Add the values of a row of a ring."""
        self.requests += values[0]
        self.served += values[1]
        self.downloaded += values[2]
        self.errors += values[3]
        self.stale += values[4]
        if with_latencies and (values[5] or values[6]):
            codes = b"".join(word.to_bytes(_CODES_PER_WORD, "little") for word in values[5:7])
            self.latencies = [
                count + _COUNT_OF_CODE[code] for count, code in zip(self.latencies, codes[:_COUNTS], strict=True)
            ]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not (self.requests or self.served or self.downloaded or self.errors or any(self.latencies))

    def percentile(self, part: float) -> float | None:
        """Return the latency in seconds that `part` of the requests did not exceed; None without requests."""
        wanted = part * sum(self.latencies)
        if not wanted:
            return None
        for index, count in enumerate(self.latencies):
            if count and wanted <= count:
                low = BUCKETS[index - 1] if index else 0.0
                high = BUCKETS[min(index, len(BUCKETS) - 1)]
                return low + (high - low) * wanted / count
            wanted -= count
        return BUCKETS[-1]

    def row(self) -> tuple[int, ...]:
        """Return the values of a row of a ring."""
        codes = [_encode_count(count) for count in self.latencies]
        low, high = (
            int.from_bytes(bytes(codes[start : start + _CODES_PER_WORD]), "little") for start in (0, _CODES_PER_WORD)
        )
        counters = (self.requests, self.served, self.downloaded, self.errors, self.stale)
        return *(min(max(0, counter), 2**64 - 1) for counter in counters), low, high

    @classmethod
    def from_row(cls, values: Sequence[int]) -> Numbers:
        """Return the numbers that `row` returned the values of."""
        numbers = cls()
        numbers.add_row(values)
        return numbers


def _encode_count(count: int) -> int:
    """Return `count` in eight bits, so that all buckets of a histogram fit into a row: five bits are the exponent."""
    if count < _RATE:
        return max(0, count)
    exponent = count.bit_length() - 4
    return min(255, _RATE + (exponent - 1) * 8 + ((count >> exponent) & 7))


def _decode_count(code: int) -> int:
    """Return the count that `_encode_count` turned into `code`, with an error of at most a sixteenth."""
    if code < _RATE:
        return code
    exponent, mantissa = divmod(code - _RATE, 8)
    return ((8 + mantissa) << (exponent + 1)) + (1 << exponent)


_COUNT_OF_CODE = tuple(map(_decode_count, range(256)))


def current_numbers(metrics: Metrics) -> dict[str, Numbers]:
    """Return the numbers of each registry since the start of the daemon."""
    numbers = {name: Numbers() for name in metrics.registries if name != OWN}
    for sample in metrics.samples(REQUESTS):
        if sample.registry in numbers:
            numbers[sample.registry].requests += int(sample.value)
            if sample.labels[1] == "STALE":
                numbers[sample.registry].stale += int(sample.value)
    for family, attribute in ((SENT_BYTES, "served"), (RECEIVED_BYTES, "downloaded"), (UPSTREAM_FAILURES, "errors")):
        for sample in metrics.samples(family):
            if sample.registry in numbers:
                of_registry = numbers[sample.registry]
                setattr(of_registry, attribute, getattr(of_registry, attribute) + int(sample.value))
    for sample in metrics.samples(UPSTREAM_REQUESTS):
        if sample.registry in numbers and sample.labels[-1] == "5xx":
            numbers[sample.registry].errors += int(sample.value)
    for sample in metrics.samples(RESPONSES):
        if sample.registry == HOSTED and sample.labels[0] == "5xx":
            numbers[HOSTED].errors += int(sample.value)
    for sample in metrics.samples(UPSTREAM_SECONDS):
        if sample.registry in numbers and sample.registry != HOSTED:
            numbers[sample.registry].latencies = list(sample.buckets)
    for sample in metrics.samples(REQUEST_SECONDS):
        if sample.registry == HOSTED:
            old = numbers[HOSTED].latencies
            numbers[HOSTED].latencies = [a + b for a, b in zip(old, sample.buckets, strict=True)]
    return numbers


@frozen
class Series:
    """The numbers of a range in bins of `step` seconds, the first of which begins at `start` (POSIX time)."""

    step: int
    start: int
    bins: list[Numbers]


@frozen
class Summary:
    """The numbers of a range, and the bytes that were served in at most `MAX_BARS` equal parts of it."""

    numbers: Numbers
    bars: tuple[int, ...]


class History:
    """The ring files in `directory`. `clock` returns POSIX time. All methods block, except those of the constructor.

    A lock lets one thread at a time use the files.
    """

    def __init__(self, directory: str, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._metrics = metrics
        self._wall_clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, Numbers] = {}  # the counters at the last sample
        self._current: dict[tuple[str, str], tuple[int, Numbers]] = {}  # the rows in progress, by ring and registry
        self._named: set[str] = set()  # registries that have files
        self._warned_at: float | None = None
        self._summaries: dict[str, tuple[float, Mapping[str, Summary]]] = {}  # by range, with their times
        self._total: tuple[float, Numbers, float | None] = (-inf, Numbers(), None)  # with its time

    def _clock(self) -> float:
        return max(0.0, self._wall_clock())  # a machine without a clock of its own may begin before 1970

    def sample(self) -> None:
        """Add to the rings what the counters have grown by since the last call. Never raise OSError."""
        with self._lock:
            now, total = self._clock(), Numbers()
            for name, numbers in current_numbers(self._metrics).items():
                growth = Numbers()
                growth.add(numbers)
                growth.add(self._last.get(name, Numbers()), -1)
                self._last[name] = numbers
                if not growth.is_empty:
                    total.add(growth)
                    if self._has_files(name):
                        self._add(name, _OF_REGISTRIES, now, growth)
            if not total.is_empty:
                self._add(ALL, _RINGS, now, total)

    def series(self, range_name: str, registry: str = ALL, *, with_latencies: bool = False) -> Series:
        """Return the numbers of a range, one of `RANGES`, up to now. Bins of one registry have at least 5 min."""
        span = RANGES[range_name]
        ring_name, step = span.ring, span.step
        if registry != ALL and ring_name not in _OF_REGISTRIES:
            ring_name, step = "5min", max(300, step)
        ring, now = self._ring(ring_name, registry), self._clock()
        last_bin = int(now // step)
        first_bin = last_bin - span.seconds // step + 1
        bins = [Numbers() for _ in range(first_bin, last_bin + 1)]
        with self._lock:
            rows = ring.read(ring.period(first_bin * step), ring.period(now))
        for period, values in rows:
            bins[period * ring.step // step - first_bin].add_row(values, with_latencies=with_latencies)
        return Series(step, first_bin * step, bins)

    def summaries(self, range_name: str) -> Mapping[str, Summary]:
        """Return the numbers of a range in all (`ALL`) and for each registry.

        They are as old as a thirtieth of a bin at most, or 10 s, because a long range takes a while.
        """
        now = self._clock()
        computed_at, summaries = self._summaries.get(range_name, (-inf, {}))
        if not 0 <= now - computed_at < max(_KEPT, RANGES[range_name].step / 30):
            summaries = {}
            for name in (ALL, *sorted(self._metrics.registries - {OWN})):
                summaries[name] = self._summarize(range_name, name)
                time.sleep(_PAUSE)
            self._summaries[range_name] = now, summaries
        return summaries

    def _summarize(self, range_name: str, name: str) -> Summary:
        bins = self.series(range_name, name, with_latencies=True).bins
        numbers = Numbers()
        for part in bins:
            if not part.is_empty:
                numbers.add(part)
        size = -(-len(bins) // MAX_BARS)
        bars = (sum(part.served for part in bins[at : at + size]) for at in range(0, len(bins), size))
        return Summary(numbers, tuple(bars))

    def total(self) -> tuple[Numbers, float | None]:
        """Return the numbers of the last two years in all, and the POSIX time at which they begin; None if never.

        They may be some seconds old.
        """
        now = self._clock()
        computed_at, numbers, since = self._total
        if not 0 <= now - computed_at < _KEPT:
            ring = self._ring("1h", ALL)
            with self._lock:
                rows = ring.read(max(0, ring.period(now) - ring.rows + 1), ring.period(now))
            numbers, since = Numbers(), float(rows[0][0] * ring.step) if rows else None
            for _, values in rows:
                numbers.add_row(values, with_latencies=False)
            self._total = now, numbers, since
        return numbers, since

    def _add(self, name: str, rings: Iterable[str], now: float, growth: Numbers) -> None:
        for ring_name in rings:
            ring = self._ring(ring_name, name)
            period = ring.period(now)
            current_period, numbers = self._current.get((ring_name, name), (-1, Numbers()))
            if current_period != period:
                # After a restart, the row goes on.
                rows = ring.read(period, period)
                numbers = Numbers.from_row(rows[0][1]) if rows else Numbers()
            numbers.add(growth)
            self._current[ring_name, name] = period, numbers
            try:
                os.makedirs(self._directory, mode=0o700, exist_ok=True)
                ring.write(period, numbers.row())
            except OSError as error:
                self._warn(ring.path, error)

    def _warn(self, path: str, error: OSError) -> None:
        now = self._clock()
        if self._warned_at is None or not 0 <= now - self._warned_at < _WARN_INTERVAL:
            self._warned_at = now
            log.warn(
                "cannot write {path}: {reason}; the numbers over time lack what is counted until that works",
                path=path, reason=error.strerror,
            )  # fmt: skip

    def _has_files(self, name: str) -> bool:
        if name not in self._named and len(self._named) < _MAX_REGISTRIES:
            self._named.add(name)
        return name in self._named

    def _ring(self, ring_name: str, registry: str) -> RingFile:
        step, rows = _RINGS[ring_name]
        prefix = f"{_file_name(registry)}." if registry != ALL else ""
        return RingFile(f"{self._directory}/{prefix}{ring_name}.ring", step, rows)


class HistoryService(TimerService):
    """Samples the counters every `SAMPLE_INTERVAL` seconds in a thread, and once more when the daemon stops."""

    def __init__(self, reactor: Any, history: History) -> None:
        super().__init__(SAMPLE_INTERVAL, self._sample)  # type: ignore[no-untyped-call]
        self.clock = reactor
        self._history = history
        self._reactor = reactor

    def _sample(self) -> Deferred[None]:
        return spawn(in_thread(self._reactor, self._history.sample), "sampling the numbers over time")

    def stopService(self) -> Deferred[None]:
        stopped: Deferred[None] = Deferred.fromCoroutine(self._stop())
        return stopped

    async def _stop(self) -> None:
        await super().stopService()  # type: ignore[no-untyped-call]
        await self._sample()


def _file_name(registry: str) -> str:
    return quote(registry, safe="")
