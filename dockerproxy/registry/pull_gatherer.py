"""Gathers the pulls of one process for a minute, and turns them into the rows of the history.

A row is not a request but a pull: what one client did with one reference of a repository. Only requests for manifests,
and those for blobs that were no hits, are gathered. A hit of a blob costs nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attrs import define, field, frozen

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.errors import RegistryError
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Digest
from dockerproxy.oci.routes import Kind, Target, route_hosted
from dockerproxy.shares import client_key
from dockerproxy.store.journal import bounded

INTERVAL = 60.0
"""Seconds over which events are gathered."""

_MAX_PULLS, _MAX_FAILURES = 5000, 500  # events of a minute; more are left out
_MAX_AT_ONCE = 200  # events that become rows at once, which takes some milliseconds
_SHARE = 2  # one client may have one part in so many
_MAX_DIGESTS = 8  # of blobs in a row

NEWS = frozenset({"MISS", "JOINED", "STALE", "REVALIDATED"})
"""The cache statuses of blobs that are gathered."""

Row = dict[str, Any]


@define
class _Event:
    """Requests that were alike. The `time` (POSIX) and the `user_agent` are those of the first."""

    client: str
    user: str | None
    registry: str
    path: str
    method: str
    status: int
    verdict: str
    because: str
    user_agent: str | None
    time: float
    count: int = 1
    size: int = 0

    @property
    def failed(self) -> bool:
        return self.status >= 400


@define(eq=False)
class PullGatherer:
    """Passes the rows of each minute to `report`, at most 100 at a time."""

    _reactor: Any
    _report: Callable[[list[Row]], object]
    _clock: Callable[[], float] = time.time
    _events: dict[tuple[object, ...], _Event] = field(factory=dict, init=False)
    _held: defaultdict[tuple[bool, str], int] = field(factory=lambda: defaultdict(int), init=False)
    _timer: Any = field(default=None, init=False)

    def note(self, request: Request) -> None:
        """Note a finished request, if it is about a manifest, or a blob that was no hit."""
        kind, verdict = request.kind, request.cache_status
        if kind == "manifest" or (verdict in NEWS and kind == "blob"):
            self._add(request)

    def flush(self) -> None:
        """Report what was gathered."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        self._report_rows(rows_of(self._take_events()))

    def _flush_later(self) -> None:
        """Report what was gathered in the last minute. Much of it takes a third of a second, so a thread does that."""
        self._timer = None
        if len(self._events) <= _MAX_AT_ONCE:
            self.flush()
        else:
            spawn(self._flush_in_thread(), "gathering pulls")

    async def _flush_in_thread(self) -> None:
        self._report_rows(await in_thread(self._reactor, rows_of, self._take_events()))

    def _take_events(self) -> list[_Event]:
        events, self._events = list(self._events.values()), {}
        self._held.clear()
        return events

    def _report_rows(self, rows: list[Row]) -> None:
        for start in range(0, len(rows), 100):
            self._report(rows[start : start + 100])

    def _add(self, request: Request) -> None:
        if not request.status or request.method not in ("GET", "HEAD"):
            return
        if request.status == 401 and "authorization" not in request.headers:
            return  # the challenge with which each pull begins
        user = request.user or request.proxy_user
        outcome = request.status, request.cache_status, request.because
        key = request.client, user, request.registry, request.path, request.method, outcome
        event = self._events.get(key)
        if event is None:
            event = _Event(
                request.client, user, request.registry, request.path, request.method, *outcome, request.user_agent,
                self._clock(), 0,
            )  # fmt: skip
            if not self._has_room(event):
                return
            self._events[key] = event
            if self._timer is None:
                self._timer = self._reactor.callLater(INTERVAL, self._flush_later)
        event.count += 1
        event.size += request.bytes_sent

    def _has_room(self, event: _Event) -> bool:
        limit = _MAX_FAILURES if event.failed else _MAX_PULLS
        for owner, bound in ((client_key(event.client), limit // _SHARE), ("", limit)):
            if self._held[event.failed, owner] >= bound:
                return False
        for owner in (client_key(event.client), ""):
            self._held[event.failed, owner] += 1
        return True


@frozen
class _Parsed:
    event: _Event
    target: Target

    @property
    def is_tag(self) -> bool:
        return not isinstance(self.target.reference, Digest)


def rows_of(events: Iterable[_Event]) -> list[Row]:
    """Return the rows of `events`, in the order of their times.

    A pull by tag goes on by digest: of an index, and of an image in it. These requests are no rows of their own unless
    they failed, or were no hits. ``pulls`` is the number of pulls: the most GETs of one reference. It is 0 for a client
    that has only asked whether a tag has moved.
    """
    manifests: defaultdict[tuple[object, ...], list[_Parsed]] = defaultdict(list)
    blobs: defaultdict[tuple[object, ...], list[_Parsed]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.time):
        try:
            parsed = _Parsed(event, route_hosted(event.path))
        except RegistryError:
            continue  # a name that is none
        owner = event.client, event.user, event.registry, parsed.target.name
        if parsed.target.kind is Kind.MANIFEST:
            manifests[owner].append(parsed)
        elif parsed.target.kind is Kind.BLOB:
            blobs[(*owner, event.verdict, event.because, event.failed)].append(parsed)
    rows = [row for group in manifests.values() for row in _rows_of_manifests(group)]
    rows += [_blob_row(group) for group in blobs.values()]
    return sorted(rows, key=lambda row: str(row["time"]))


def _rows_of_manifests(group: Sequence[_Parsed]) -> list[Row]:
    """Return the rows for the manifests of one repository that one client requested."""
    by_reference: defaultdict[str, list[_Parsed]] = defaultdict(list)
    for parsed in group:
        by_reference[str(parsed.target.reference)].append(parsed)
    pulls = {name: sum(one.event.count for one in items if _is_pull(one)) for name, items in by_reference.items()}
    tags = [name for name, items in by_reference.items() if items[0].is_tag and not all(i.event.failed for i in items)]
    digests = [name for name, items in by_reference.items() if not items[0].is_tag]
    first = next(iter(tags or digests), "")
    if digests and (not tags or not any(pulls[tag] for tag in tags)):
        # By digest alone, or as containerd does: HEAD of the tag, then GET of what it leads to.
        most = max(pulls[name] for name in digests)
        pulls |= dict.fromkeys(digests, 0) | {first: most}
    elif tags:
        pulls |= dict.fromkeys(digests, 0)
    rows = []
    for name, items in by_reference.items():
        is_part = bool(tags or digests) and name != first and not items[0].is_tag
        outcomes: defaultdict[tuple[int, str, str], list[_Parsed]] = defaultdict(list)
        for item in items:
            event = item.event
            outcomes[event.status if event.failed else 0, event.verdict, event.because].append(item)
        by_tag = items[0].is_tag and any(map(_is_pull, items))
        for (failure, verdict, _), group in outcomes.items():
            if failure or not (is_part and verdict in ("HIT", "-")):
                own = sum(item.event.count for item in group if _is_pull(item)) if by_tag else pulls.pop(name, 0)
                rows.append(_row(group[0], group, name, 0 if failure else own))
    return rows


def _is_pull(parsed: _Parsed) -> bool:
    return parsed.event.method == "GET" and not parsed.event.failed


def _blob_row(group: Sequence[_Parsed]) -> Row:
    digests = list(dict.fromkeys(str(parsed.target.reference) for parsed in group))
    row = _row(group[0], group, digests[0], 0)
    return {**row, "kind": "blob", "blobs": len(digests), "digests": digests[:_MAX_DIGESTS]}


def _row(parsed: _Parsed, group: Sequence[_Parsed], reference: str, pulls: int) -> Row:
    event = parsed.event
    is_hosted = event.registry == "hosted"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(group[0].event.time)),
        "client": bounded(event.client),
        "user": event.user and bounded(event.user),
        "user_agent": event.user_agent and bounded(event.user_agent),
        "where": "hosted" if is_hosted else "cached",
        "repository": str(parsed.target.name) if is_hosted else f"{event.registry}/{parsed.target.name}",
        "kind": "manifest",
        "reference": reference,
        "status": event.status,
        "verdict": event.verdict,
        "because": bounded(event.because),
        "bytes": sum(item.event.size for item in group),
        "requests": sum(item.event.count for item in group),
        "pulls": pulls,
    }
