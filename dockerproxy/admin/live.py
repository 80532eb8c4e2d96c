"""Events for people that look on: downloads under way and traffic, once a second.

Each process computes one sum a second for all its viewers, from shared memory, while it has any. A viewer gets the
differences only. The events are Server-Sent Events (HTML, 9.2), or lines of JSON on the control socket.

A viewer that does not read costs 64 KiB, then its connection is closed. A stream ends when its viewer loses, or gets,
rights by a sign-out, another password or a reload; the page then opens another one. All processes together have at most
`MAX_VIEWERS`; others poll.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from dockerproxy.admin.layer_places import LayerPlaces
from dockerproxy.admin.shown_transfers import BlobTransfer, blob_transfers
from dockerproxy.admin.viewer import MAX_VIEWERS, RETRY_AFTER, Viewer, ViewerOf
from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.cache.access import public_may_read
from dockerproxy.cache.board import Board, BoardPart
from dockerproxy.concurrency import spawn
from dockerproxy.daemon.metrics import OWN, RECEIVED_BYTES, SENT_BYTES, UPSTREAM_UP, Metrics
from dockerproxy.errors import RegistryError, ServiceOverloaded, TooManyRequests
from dockerproxy.http.request import ClientDisconnected, Request
from dockerproxy.shares import ClientShares
from dockerproxy.store.records import Records

INTERVAL = 1.0
"""Seconds between two sums."""

MAX_UNREAD = 64 * 1024
"""Bytes that wait for a viewer that does not read; then it is dropped."""

_KEEP_ALIVE = 15.0  # seconds without an event after which a comment shows that the connection lives
_PUBLIC_KEPT = 10.0  # seconds for which the answer to "is it public?" counts
_MAX_PUBLIC_KEPT = 1000
_CHECK_INTERVAL = 5.0  # seconds between two questions who a viewer is
_USAGE_INTERVAL = 5.0  # seconds between two questions about the cache
_TRAFFIC_SAMPLES = 10
_SMOOTHING = 0.4  # part of the last second in the rate of a transfer

log = Logger()

State = Mapping[str, Any]
"""The things that events are about: ``transfers``, ``registries``, ``traffic`` and ``cache``, as a viewer sees them."""


def difference(old: State | None, new: State) -> dict[str, Any]:
    """Return what has changed from `old` to `new`, or all of `new` with ``first`` if there is no `old`. Pure.

    A transfer that was there before has its identifier and the changed fields. Those that have ended are in ``ended``.
    An empty result says that nothing has changed.
    """
    if old is None:
        return {"first": True, **new, "ended": []}
    changed: dict[str, Any] = {}
    before = {transfer["id"]: transfer for transfer in old["transfers"]}
    transfers = []
    for transfer in new["transfers"]:
        known = before.pop(transfer["id"], None)
        if known is None:
            transfers.append(transfer)
        elif known != transfer:
            fields = {name: value for name, value in transfer.items() if known.get(name) != value}
            transfers.append({"id": transfer["id"], **fields})
    if transfers:
        changed["transfers"] = transfers
    if before:
        changed["ended"] = list(before)
    registries = [registry for registry in new["registries"] if registry not in old["registries"]]
    if registries:
        changed["registries"] = registries
    for name in ("traffic", "cache"):
        if new[name] != old[name]:
            changed[name] = new[name]
    return changed


@frozen
class _Sight:
    """The things that a viewer may see. Viewers with the same sight get the same events."""

    is_admin: bool
    reads_hosted: bool

    @classmethod
    def of(cls, viewer: Viewer) -> _Sight:
        return cls(viewer.is_admin, viewer.reads_hosted)


@frozen
class _Format:
    """The form of the events: header fields, and the bytes around each event. `keep_alive` is sent if there is none."""

    fields: tuple[tuple[str, str], ...]
    before: bytes
    after: bytes
    keep_alive: bytes

    def message(self, event: bytes) -> bytes:
        """Return the bytes to send for an event, or to show that the connection lives if it is empty."""
        return self.before + event + self.after if event else self.keep_alive


_EVENTS = _Format(
    (
        ("Content-Type", "text/event-stream; charset=utf-8"),
        ("Cache-Control", "no-store"),
        ("X-Accel-Buffering", "no"),  # nginx would hold events back otherwise
    ),
    b"data: ", b"\n\n", b": nothing new\n\n",
)  # fmt: skip
_LINES = _Format((("Content-Type", "application/x-ndjson"), ("Cache-Control", "no-store")), b"", b"\n", b"{}\n")


@define(eq=False)
class _Stream:
    """The response to one viewer. `ended` fires when it is to end. `viewer_of` says whether they are still `viewer`."""

    request: Request
    viewer: Viewer
    format: _Format
    viewer_of: ViewerOf | None = None
    checked_at: float = 0.0
    is_being_checked: bool = False
    ended: Deferred[None] = field(factory=Deferred)
    is_new: bool = True
    sent_at: float = 0.0
    waiting: int = 0  # bytes that were written since the client last took all


@define
class _Rates:
    """Bytes a second: of each transfer by its identifier, and of all traffic, from the counters of the last seconds."""

    of_transfers: dict[str, int] = field(factory=dict)
    done: dict[str, int] = field(factory=dict)
    totals: deque[tuple[float, int, int]] = field(factory=lambda: deque(maxlen=_TRAFFIC_SAMPLES))

    def update(self, transfers: Iterable[BlobTransfer]) -> None:
        """Compute the rates of transfers, one `INTERVAL` after the last call."""
        done = {transfer.id: transfer.done for transfer in transfers}
        rates = {}
        for identifier, size in done.items():
            now = max(0, size - self.done.get(identifier, size)) / INTERVAL
            # Downloads write about once a second themselves, so a second may have the bytes of two.
            old = self.of_transfers.get(identifier, now)
            rates[identifier] = round(old + (now - old) * _SMOOTHING)
        self.done, self.of_transfers = done, rates

    def traffic(self, now: float, served: int, downloaded: int) -> dict[str, int]:
        """Return the bytes a second to clients and from registries, given the counters."""
        self.totals.append((now, served, downloaded))
        began, first_served, first_downloaded = self.totals[0]
        seconds = max(INTERVAL, now - began)
        return {
            "served": round((served - first_served) / seconds),
            "downloaded": round((downloaded - first_downloaded) / seconds),
        }


class LiveFeed:
    """The streams of one process, bounded by `viewers`. `usage` returns the bytes of the cache and their limit."""

    def __init__(
        self,
        reactor: Any,
        board: Board,
        part: BoardPart,
        metrics: Metrics,
        records: Records,
        places: LayerPlaces,
        usage: Callable[[], Awaitable[tuple[int, int]]],
        clock: Callable[[], float],
        viewers: ClientShares,
    ) -> None:
        self._reactor = reactor
        self._board = board
        self._part = part
        self._metrics = metrics
        self._records = records
        self._places = places
        self._usage = usage
        self._clock = clock
        self._usage_at = 0.0
        self._streams: dict[_Stream, None] = {}
        self._states: dict[_Sight, State] = {}  # as of the last sum
        self._rates = _Rates()
        self._cache: dict[str, int] = {}
        self._is_finding_places = False
        self._public: BoundedDict[str, bool] = BoundedDict(_MAX_PUBLIC_KEPT, ttl=_PUBLIC_KEPT, clock=reactor.seconds)
        self._loop = LoopingCall(self._tick)
        self._loop.clock = reactor
        self.viewers = viewers

    async def send_events(self, request: Request, viewer: Viewer, viewer_of: ViewerOf) -> None:
        """Respond with Server-Sent Events until the viewer leaves, does not read, or has other rights.

        `viewer_of` returned `viewer`, and is asked again now and then.
        Raise `ServiceOverloaded` or `TooManyRequests` if there are too many viewers.
        """
        await self._send(_Stream(request, viewer, _EVENTS, viewer_of, self._reactor.seconds()))

    async def send_lines(self, request: Request, viewer: Viewer) -> None:
        """Respond with the same events as lines of JSON. Raise the same errors."""
        await self._send(_Stream(request, viewer, _LINES))

    async def _send(self, stream: _Stream) -> None:
        request = stream.request
        is_local = stream.format is _LINES
        client = "" if is_local else request.client
        if self._board.viewers >= MAX_VIEWERS and not is_local:
            raise ServiceOverloaded(
                f"{self._board.viewers} live views are open, and there is room for {MAX_VIEWERS};"
                " the same numbers are at /api/v1/overview",
                headers=[("Retry-After", str(RETRY_AFTER))],
            )
        self.viewers.acquire(client)
        self._part.set_viewers(self.viewers.used)
        try:
            request.start(200, stream.format.fields, None)
            if request.method != "HEAD":
                request.closing = False  # from here on, it says that the server drains, not what the client asked for
                self._streams[stream] = None
                if self._loop.running:
                    self._send_state(stream)
                else:
                    self._loop.start(INTERVAL, now=True)
                await stream.ended
                request.closing = True  # because the server drains
            request.finish()
        finally:
            self._streams.pop(stream, None)
            self.viewers.release(client)
            self._part.set_viewers(self.viewers.used)

    def _tick(self) -> None:
        try:
            self._update()
        except Exception:  # the loop would end for all viewers
            log.failure("computing the live view failed")

    def _update(self) -> None:
        for stream in list(self._streams):
            if stream.request.closing or stream.request.finished:
                self._end(stream)
            else:
                self._check_soon(stream)
        if not self._streams:
            self._loop.stop()
            self._states, self._rates = {}, _Rates()
            return
        self._read_usage()
        transfers = blob_transfers(self._board.rows())
        self._rates.update(transfers)
        if transfers and not self._is_finding_places:
            self._is_finding_places = True
            spawn(self._find_places(transfers), "looking for the places of blobs")
        registries, traffic = self._registries(), self._traffic()
        old_states, self._states = self._states, {}
        events: dict[_Sight, bytes] = {}
        for stream in list(self._streams):
            sight = _Sight.of(stream.viewer)
            if sight not in self._states:
                self._states[sight] = {
                    "transfers": self._show(transfers, stream.viewer),
                    "registries": registries,
                    "traffic": traffic,
                    "cache": self._cache,
                }
                event = difference(old_states.get(sight), self._states[sight])
                if completed := list(filter(self._board.is_complete, event.get("ended", ()))):
                    event["completed"] = completed
                events[sight] = self._encode(event)
            if stream.is_new:
                self._send_state(stream)
            else:
                self._write(stream, events[sight])

    def _check_soon(self, stream: _Stream) -> None:
        """Ask whether the viewer has the same rights as before, unless that was done a moment ago."""
        now = self._reactor.seconds()
        if stream.viewer_of is not None and not stream.is_being_checked and now - stream.checked_at >= _CHECK_INTERVAL:
            stream.checked_at, stream.is_being_checked = now, True
            spawn(self._check(stream, stream.viewer_of), "looking who a viewer is")

    async def _check(self, stream: _Stream, viewer_of: ViewerOf) -> None:
        try:
            is_same = _Sight.of(await viewer_of(stream.request)) == _Sight.of(stream.viewer)
        except (ServiceOverloaded, TooManyRequests):
            is_same = True  # nobody can say it now
        except RegistryError:
            is_same = False
        finally:
            stream.is_being_checked = False
        if not is_same:
            self._end(stream)

    async def _find_places(self, transfers: Iterable[BlobTransfer]) -> None:
        try:
            await self._places.find(blob for transfer in transfers for blob in transfer.blobs)
        finally:
            self._is_finding_places = False

    def _show(self, transfers: Iterable[BlobTransfer], viewer: Viewer) -> list[dict[str, Any]]:
        labels, rates = self._metrics.registries, self._rates.of_transfers
        return [
            transfer.show(viewer, labels, self._is_public, self._places.known, rates[transfer.id])
            for transfer in transfers
        ]

    def _registries(self) -> list[dict[str, Any]]:
        return [{"name": sample.registry, "up": bool(sample.value)} for sample in self._metrics.samples(UPSTREAM_UP)]

    def _traffic(self) -> dict[str, int]:
        served, downloaded = (
            sum(int(sample.value) for sample in self._metrics.samples(family) if sample.registry != OWN)
            for family in (SENT_BYTES, RECEIVED_BYTES)
        )
        return self._rates.traffic(self._reactor.seconds(), served, downloaded)

    def _is_public(self, repository: str) -> bool:
        known = self._public.get(repository)
        if known is None:
            known = self._public[repository] = public_may_read(self._records, repository)
        return known

    def _read_usage(self) -> None:
        now = self._reactor.seconds()
        if not self._usage_at or now - self._usage_at >= _USAGE_INTERVAL:
            self._usage_at = now
            spawn(self._ask_usage(), "reading the usage of the cache")

    async def _ask_usage(self) -> None:
        used, limit = await self._usage()
        self._cache = {"bytes": used, "limit": limit}

    # streams

    def _send_state(self, stream: _Stream) -> None:
        """Send all there is to a new viewer. If nobody else sees the same, the next sum does that."""
        state = self._states.get(_Sight.of(stream.viewer))
        if state is not None:
            stream.is_new = False
            self._write(stream, self._encode(difference(None, state)))

    def _encode(self, event: dict[str, Any]) -> bytes:
        return json.dumps({"now": self._clock(), **event}, separators=(",", ":")).encode() if event else b""

    def _write(self, stream: _Stream, event: bytes) -> None:
        now = self._reactor.seconds()
        if not event and now - stream.sent_at < _KEEP_ALIVE:
            return
        data = stream.format.message(event)
        stream.sent_at = now
        if stream.waiting + len(data) > MAX_UNREAD:
            log.info("closed the live view of {client}, which does not read", client=stream.request.client)
            stream.request.abort()
            self._end(stream)
            return
        stream.request.write(data)
        stream.waiting += len(data)
        if stream.waiting == len(data):
            spawn(self._drain(stream), "waiting for a viewer")

    async def _drain(self, stream: _Stream) -> None:
        with suppress(ClientDisconnected):
            await stream.request.drain()
        stream.waiting = 0

    def _end(self, stream: _Stream) -> None:
        self._streams.pop(stream, None)
        if not stream.ended.called:
            stream.ended.callback(None)
