"""Counters of all processes, in shared memory. Any process can read their sums.

Each process increments its own counters, so that counting needs no lock. A worker that replaces a dead one continues
with its counters, so a counter never decreases while the daemon runs. `dockerproxy.daemon.exposition` renders them for
Prometheus.

Counters of requests exist once for each registry. The label `registry` has one of a fixed number of values: the
registries in the settings, and three more. No client can add one by asking for a host.
"""

from __future__ import annotations

import math
import mmap
import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, product

from attrs import field, frozen
from twisted.logger import Logger

CACHE_STATUSES = ("HIT", "MISS", "PEER", "JOINED", "REVALIDATED", "STALE", "PASS", "-")
"""Values of the label `verdict`, as in the access log."""

KINDS = ("manifest", "blob", "tags", "referrers", "token", "other")
"""Values of the label `kind`: the resource that a request is about."""

_KIND_LABELS = {"uploads": "blob", "upload": "blob"} | {kind: kind for kind in KINDS}  # by `oci.routes.Kind`

HOSTED, OWN, OTHER = "hosted", "own", "other"
"""Values of the label `registry` that are no upstream registry: the hosted one, the daemon's pages, everything else."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of all histograms, in seconds."""

METHODS = ("GET", "HEAD", "other")

FAILURE_REASONS = ("timeout", "dns", "refused", "unreachable", "tls", "reset", "proxy", "invalid", "other")
"""Values of the label `reason` of failures; see `UpstreamError.reason`."""

REFUSERS = ("registry", "proxy")
LOGIN_RESULTS = ("accepted", "refused")
PIN_STATES = ("complete", "incomplete")

EVICTION_REASONS = ("room", "inactive")

PEER_DIRECTIONS = ("received", "sent")
PEER_STATES = ("up", "down")

REFUSING_SETTINGS = (
    "ALLOW_CLIENTS", "ALLOW_DELETE", "ALLOW_PUSH", "ALLOWED_HOSTS", "CACHE_MAX_BLOB_SIZE", "CACHE_MAX_SIZE",
    "CLIENT_MIN_RATE", "CORS_ORIGINS", "MAX_UPLOADS", "MAX_UPLOADS_PER_CLIENT", "REGISTRIES", "REGISTRY_READ_ONLY",
    "TUNNEL_ALLOW", "TUNNEL_DENY", "TUNNEL_PORTS",
)  # fmt: skip
"""Settings for which requests are refused. The sentence of such an error names its setting."""

_SETTING = re.compile(r"\b(?:" + "|".join(sorted(REFUSING_SETTINGS, key=len, reverse=True)) + r")\b")

# "other" counts clients that disconnected before the response, and statuses outside 100..599.
_STATUS_CLASSES = ("other", "1xx", "2xx", "3xx", "4xx", "5xx")

_COUNTER_SIZE = 8  # bytes; an aligned 64-bit word is read and written atomically
_NAME_SIZE = 264  # bytes of a registry's name and its length; a DNS name has at most 253 characters, and a port follows
_SPARE_REGISTRIES = 64  # registries that a reload can add

log = Logger()


@frozen(eq=False)
class Family:
    """The values of one metric, of each registry or once: a block with a cell for each combination of label values.

    A cell of a counter or a gauge is one word. A cell of a histogram is one word for each bucket, the last of which is
    unlimited, and one for the sum in microseconds. A gauge that is the latest of all processes, not their sum, has one
    bit that is its value, and before it the time at which it was set.
    """

    name: str
    help_text: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    is_histogram: bool = False
    is_gauge: bool = False
    is_latest: bool = False

    @property
    def words_per_cell(self) -> int:
        return len(BUCKETS) + 2 if self.is_histogram else 1

    @property
    def words(self) -> int:
        """The size of the block in words."""
        return math.prod(len(values) for _, values in self.labels) * self.words_per_cell

    @property
    def combinations(self) -> Iterator[tuple[str, ...]]:
        """The values of the labels, in the order of the cells."""
        return product(*(values for _, values in self.labels))


REQUESTS = Family(
    "requests_total",
    "Finished requests by registry, kind of resource and cache status.",
    (("kind", KINDS), ("verdict", CACHE_STATUSES)),
)
RESPONSES = Family(
    "responses_total",
    "Responses to clients by registry and class of the status.",
    (("code", _STATUS_CLASSES),),
)
SENT_BYTES = Family(
    "sent_bytes_total",
    "Bytes of response bodies sent to clients, by registry and cache status.",
    (("verdict", CACHE_STATUSES),),
)
REQUEST_SECONDS = Family(
    "request_seconds",
    "Seconds from the head of a request to the head of its response.",
    (("kind", KINDS),),
    is_histogram=True,
)

UPSTREAM_REQUESTS = Family(
    "upstream_requests_total",
    "Responses of registries, by the kind of resource, the method and the class of the status.",
    (("kind", KINDS), ("method", METHODS), ("code", _STATUS_CLASSES)),
)
UPSTREAM_FAILURES = Family(
    "upstream_failures_total",
    "Requests to registries that got no valid response, by the reason.",
    (("reason", FAILURE_REASONS),),
)
RECEIVED_BYTES = Family("upstream_received_bytes_total", "Bytes of response bodies that registries sent.")
UPSTREAM_SECONDS = Family(
    "upstream_seconds", "Seconds from a request to a registry to the head of its response.", is_histogram=True
)
UPSTREAM_UP = Family(
    "upstream_up", "Whether a registry responded when it was last asked.", is_gauge=True, is_latest=True
)

RATE_LIMIT_REFUSALS = Family(
    "ratelimit_refused_total",
    "Pulls that a registry refused (429), and those that were refused here in its stead.",
    (("by", REFUSERS),),
)

REGISTRY_FAMILIES = (
    REQUESTS, RESPONSES, SENT_BYTES, REQUEST_SECONDS,
    UPSTREAM_REQUESTS, UPSTREAM_FAILURES, RECEIVED_BYTES, UPSTREAM_SECONDS, UPSTREAM_UP, RATE_LIMIT_REFUSALS,
)  # fmt: skip
"""The families that exist once for each registry, with the label `registry`."""

REFUSALS = Family(
    "refusals_total",
    "Requests that a setting forbade, by its name.",
    (("setting", REFUSING_SETTINGS),),
)
EVICTIONS = Family(
    "cache_evictions_total",
    "Blobs and partial downloads that left the cache: to make room, or because they were inactive (CACHE_INACTIVE).",
    (("reason", EVICTION_REASONS),),
)
TUNNELS = Family("tunnels", "Open tunnels.", is_gauge=True)
DOWNLOADS = Family("downloads", "Downloads from registries in progress.", is_gauge=True)

RELOAD_SUCCESS = Family("reload_success", "Whether the settings could be used when they were last read.", is_gauge=True)

PEER_BYTES = Family(
    "peer_bytes_total",
    "Bytes of manifests and blobs that members of the fleet (FLEET) have sent to this one, and this one to them.",
    (("direction", PEER_DIRECTIONS),),
)
PEERS = Family(
    "peers", "Other members of the fleet by their state, as the main process sees it.", (("state", PEER_STATES),),
    is_gauge=True,
)  # fmt: skip

LOGINS = Family(
    "logins_total",
    "Checks of passwords for the hosted registry and the page. A login that is repeated within minutes is one.",
    (("result", LOGIN_RESULTS),),
)
WORKERS = Family("workers", "Processes that serve clients.", is_gauge=True)
WORKER_REPLACEMENTS = Family("worker_replacements_total", "Processes that ended unasked.")
PINS = Family("pins", "Pinned images, by whether all of each is here.", (("state", PIN_STATES),), is_gauge=True)
PINNED_BYTES = Family("cache_pinned_bytes", "Bytes of the cache that are pinned.", is_gauge=True)

GLOBAL_FAMILIES = (
    REFUSALS, EVICTIONS, TUNNELS, DOWNLOADS, RELOAD_SUCCESS, PEER_BYTES, PEERS,
    LOGINS, WORKERS, WORKER_REPLACEMENTS, PINS, PINNED_BYTES,
)  # fmt: skip
"""The families that exist once."""

_CPU = Family("cpu_microseconds", "Processor time of a process and of its predecessors.")
_PROCESS_ID = Family("process_id", "The ID of a process.", is_gauge=True)


def _starts(families: Sequence[Family]) -> tuple[dict[Family, int], int]:
    """Return the index of each family's first word in a block of all `families`, and the size of the block."""
    *starts, size = accumulate((family.words for family in families), initial=0)
    return dict(zip(families, starts, strict=True)), size


# Indices of words, relative to a registry's first one, or to those of the process. They are computed here, because a
# hit pays for the rest.
_START, _WORDS_PER_REGISTRY = _starts(REGISTRY_FAMILIES)
_GLOBAL_START, _GLOBAL_WORDS = _starts((*GLOBAL_FAMILIES, _CPU, _PROCESS_ID))
_RESPONSES = _START[RESPONSES]
_SENT_BYTES = {verdict: _START[SENT_BYTES] + index for index, verdict in enumerate(CACHE_STATUSES)}
_UPSTREAM_REQUESTS = {
    labels: _START[UPSTREAM_REQUESTS] + index for index, labels in enumerate(UPSTREAM_REQUESTS.combinations)
}
_REQUEST_CELLS = {
    kind: (
        {verdict: _START[REQUESTS] + index * len(CACHE_STATUSES) + i for i, verdict in enumerate(CACHE_STATUSES)},
        _START[REQUEST_SECONDS] + index * REQUEST_SECONDS.words_per_cell,
    )
    for index, kind in enumerate(KINDS)
}
"""By kind: the indices of its counters of requests, by cache status, and the first one of its histogram."""


def _status_class(status: int) -> str:
    return _STATUS_CLASSES[status // 100 if status // 100 < len(_STATUS_CLASSES) else 0]


@frozen
class Sample:
    """The sum of one cell over all processes.

    `buckets` are the counts of a histogram, not cumulated. Its `value` is the sum of what it observed.
    """

    family: Family
    registry: str
    labels: tuple[str, ...]
    value: float
    buckets: tuple[int, ...] = ()


@frozen(eq=False)
class Metrics:
    """Counters in an anonymous shared mapping that forked processes inherit.

    Each process counts with its own `for_process(index)`, and can read the totals of all.
    """

    _counters: memoryview
    _names: memoryview
    _words_per_process: int
    _first_word: int = 0  # of this process
    _earlier_cpu: int = 0  # microseconds of its predecessors
    started_at: float = field(factory=time.time)
    """The POSIX time at which the daemon was started."""
    _registries: dict[str, int] = field(factory=dict)  # of each that is known here: the first word, in this process

    @classmethod
    def make(cls, processes: int, registries: Iterable[str] = ()) -> Metrics:
        """Return metrics for that many processes, all zero, with the label values `registries`."""
        names = list(dict.fromkeys((OTHER, HOSTED, OWN, *registries)))
        slots = len(names) + _SPARE_REGISTRIES
        words_per_process = _GLOBAL_WORDS + _WORDS_PER_REGISTRY * slots
        counters = memoryview(mmap.mmap(-1, _COUNTER_SIZE * words_per_process * processes)).cast("Q")
        metrics = cls(counters, memoryview(mmap.mmap(-1, _NAME_SIZE * slots)), words_per_process)
        metrics.add_registries(names)
        return metrics

    def for_process(self, process: int) -> Metrics:
        """Return a view that counts for the process with index `process`, and set the gauges of that process to 0."""
        counters, first_word = self._counters, process * self._words_per_process
        earlier_cpu = counters[first_word + _GLOBAL_START[_CPU]]
        metrics = Metrics(counters, self._names, self._words_per_process, first_word, earlier_cpu, self.started_at)
        metrics.read_registries()
        for family in (*GLOBAL_FAMILIES, _PROCESS_ID):
            if family.is_gauge:
                start = first_word + _GLOBAL_START[family]
                counters[start : start + family.words] = memoryview(bytes(_COUNTER_SIZE * family.words)).cast("Q")
        return metrics

    @property
    def registries(self) -> frozenset[str]:
        """The values of the label `registry`."""
        return frozenset(self._registries)

    @property
    def is_first(self) -> bool:
        """Whether this is the view of the main process."""
        return self._first_word == 0

    def add_registries(self, names: Iterable[str]) -> None:
        """Add values of the label `registry`. Call this in the main process; the others call `read_registries` then.

        A name for which there is no room is counted as other, and logged.
        """
        for name in names:
            index, encoded = len(self._registries), name.encode()
            if name in self._registries:
                continue
            if (index + 1) * _NAME_SIZE > len(self._names) or len(encoded) >= _NAME_SIZE - 2:
                log.warn('the metrics count {name} as registry="other" until the next restart', name=name)
                continue
            start = index * _NAME_SIZE
            self._names[start + 2 : start + 2 + len(encoded)] = encoded
            self._names[start : start + 2] = len(encoded).to_bytes(2, "little")
            self._registries[name] = self._first_word_of(index)

    def read_registries(self) -> None:
        """Learn the values of the label `registry` that the main process has added."""
        for start in range(len(self._registries) * _NAME_SIZE, len(self._names), _NAME_SIZE):
            size = int.from_bytes(self._names[start : start + 2], "little")
            if not size:
                return
            name = bytes(self._names[start + 2 : start + 2 + size]).decode()
            self._registries[name] = self._first_word_of(start // _NAME_SIZE)

    def count_request(
        self, registry: str, kind: str, cache_status: str, status: int, size: int, latency: float | None
    ) -> None:
        """Count a finished request that sent `size` bytes of body. An unknown `registry` or `kind` counts as other.

        `status` is 0 and `latency` None if no response was sent. Otherwise `latency` are the seconds until its head.
        """
        counters, base, status_class = self._counters, self._base(registry), status // 100
        requests, histogram = _REQUEST_CELLS.get(kind) or _REQUEST_CELLS[_KIND_LABELS.get(kind, "other")]
        counters[base + requests[cache_status]] += 1
        counters[base + _RESPONSES + (status_class if status_class < len(_STATUS_CLASSES) else 0)] += 1
        counters[base + _SENT_BYTES[cache_status]] += size
        if latency is not None:
            # As `_observe` does; a hit pays for each call.
            counters[base + histogram + bisect_left(BUCKETS, latency)] += 1
            counters[base + histogram + len(BUCKETS) + 1] += int(latency * 1_000_000)

    def count_upstream(self, registry: str, kind: str, method: str, status: int, seconds: float) -> None:
        """Count a response of a registry. Its head came `seconds` after the request."""
        base = self._base(registry)
        labels = _KIND_LABELS.get(kind, "other"), method if method in METHODS else "other", _status_class(status)
        self._counters[base + _UPSTREAM_REQUESTS[labels]] += 1
        self._observe(base + _START[UPSTREAM_SECONDS], seconds)
        self._set_up(base, True)

    def count_failure(self, registry: str, reason: str) -> None:
        """Count a request to a registry that got no valid response. `reason` is one of `FAILURE_REASONS`."""
        base = self._base(registry)
        index = FAILURE_REASONS.index(reason if reason in FAILURE_REASONS else "other")
        self._counters[base + _START[UPSTREAM_FAILURES] + index] += 1
        self._set_up(base, False)

    def count_received(self, registry: str, size: int) -> None:
        """Count `size` bytes of a body that a registry sent."""
        self._counters[self._base(registry) + _START[RECEIVED_BYTES]] += size

    def _set_up(self, base: int, is_up: bool) -> None:
        self._counters[base + _START[UPSTREAM_UP]] = time.monotonic_ns() // 1000 << 1 | is_up

    def count_refusal(self, sentence: str) -> None:
        """Count an error if its `sentence` names the setting that forbade the request."""
        setting = _SETTING.search(sentence)
        if setting is not None:
            self._add(REFUSALS, REFUSING_SETTINGS.index(setting[0]), 1)

    def count_evictions(self, reason: str, count: int) -> None:
        """Count blobs and partial downloads that left the cache for one of `EVICTION_REASONS`."""
        self._add(EVICTIONS, EVICTION_REASONS.index(reason), count)

    def count_peer_bytes(self, direction: str, size: int) -> None:
        """Count `size` bytes that members of the fleet have sent: a `direction` of `PEER_DIRECTIONS`."""
        self._add(PEER_BYTES, PEER_DIRECTIONS.index(direction), size)

    def set_peers(self, up: int, down: int) -> None:
        """Set how many other members of the fleet are up, and how many are down."""
        start = self._first_word + _GLOBAL_START[PEERS]
        self._counters[start], self._counters[start + 1] = up, down

    def set(self, gauge: Family, value: int) -> None:
        """Set a gauge of this process. Its value is the sum over all processes."""
        self._counters[self._first_word + _GLOBAL_START[gauge]] = value

    def count_of(self, registry: str, cache_status: str) -> int:
        """Return how many requests for a registry had a cache status, over all processes; 0 if it is unknown."""
        first_word = self._registries.get(registry)
        if first_word is None:
            return 0
        cells = [first_word - self._first_word + requests[cache_status] for requests, _ in _REQUEST_CELLS.values()]
        return sum(sum(self._counters[cell :: self._words_per_process]) for cell in cells)

    def count_login(self, accepted: bool) -> None:
        """Count a password that was checked."""
        self._add(LOGINS, 0 if accepted else 1, 1)

    def count_replacement(self) -> None:
        """Count a process that ended unasked."""
        self._add(WORKER_REPLACEMENTS, 0, 1)

    def count_rate_limited(self, registry: str, by: str) -> None:
        """Count a pull that was refused by one of `REFUSERS`."""
        self._counters[self._base(registry) + _START[RATE_LIMIT_REFUSALS] + REFUSERS.index(by)] += 1

    def count_token_request(self, registry: str, method: str, status: int) -> None:
        """Count a response of a registry's token server, which says nothing about the registry itself."""
        labels = "token", method if method in METHODS else "other", _status_class(status)
        self._counters[self._base(registry) + _UPSTREAM_REQUESTS[labels]] += 1

    def count_token_failure(self, registry: str, reason: str) -> None:
        """Count a request to a registry's token server that got no valid response."""
        index = FAILURE_REASONS.index(reason if reason in FAILURE_REASONS else "other")
        self._counters[self._base(registry) + _START[UPSTREAM_FAILURES] + index] += 1

    def set_pins(self, complete: int, incomplete: int, size: int) -> None:
        """Set how many pinned images are here as a whole, how many are not, and the bytes of all."""
        start = self._first_word + _GLOBAL_START[PINS]
        self._counters[start], self._counters[start + 1] = complete, incomplete
        self.set(PINNED_BYTES, size)

    def set_process(self, process_id: int, cpu: float) -> None:
        """Set the ID of this process, and the seconds of processor time that it has used."""
        self.set(_PROCESS_ID, process_id)
        self.set(_CPU, self._earlier_cpu + int(cpu * 1_000_000))

    @property
    def cpu_seconds(self) -> float:
        """The processor time of all processes, also of those that have ended."""
        return self._sums(_GLOBAL_START[_CPU], 1)[0] / 1_000_000

    @property
    def process_ids(self) -> list[int]:
        """The IDs of the processes that serve, or have just ended."""
        return [process for process in self._counters[_GLOBAL_START[_PROCESS_ID] :: self._words_per_process] if process]

    def samples(self, family: Family) -> Iterator[Sample]:
        """Yield the sum over all processes of every cell of `family`, and of every registry that it has."""
        if family in _GLOBAL_START:
            values = self._sums(_GLOBAL_START[family], family.words)
            for labels, value in zip(family.combinations, values, strict=True):
                yield Sample(family, "", labels, value)
            return
        for registry, first_word in list(self._registries.items()):
            start = first_word - self._first_word + _START[family]
            if family.is_latest:
                latest = max(self._counters[start :: self._words_per_process])
                if latest:
                    yield Sample(family, registry, (), latest & 1)
                continue
            words = self._sums(start, family.words)
            for number, labels in enumerate(family.combinations):
                cell = words[number * family.words_per_cell : (number + 1) * family.words_per_cell]
                if family.is_histogram:
                    yield Sample(family, registry, labels, cell[-1] / 1_000_000, tuple(cell[:-1]))
                else:
                    yield Sample(family, registry, labels, cell[0])

    def _add(self, family: Family, index: int, amount: int) -> None:
        self._counters[self._first_word + _GLOBAL_START[family] + index] += amount

    def _base(self, registry: str) -> int:
        """Return the index of this process's first counter of `registry`."""
        return self._registries.get(registry) or self._registries[OTHER]

    def _first_word_of(self, index: int) -> int:
        return self._first_word + _GLOBAL_WORDS + index * _WORDS_PER_REGISTRY

    def _observe(self, cell: int, seconds: float) -> None:
        self._counters[cell + bisect_left(BUCKETS, seconds)] += 1
        self._counters[cell + len(BUCKETS) + 1] += int(seconds * 1_000_000)

    def _sums(self, start: int, words: int) -> Sequence[int]:
        starts = range(start, len(self._counters), self._words_per_process)
        blocks = [self._counters[first : first + words] for first in starts]
        return [sum(values) for values in zip(*blocks, strict=True)]
