"""Which registries do not answer, as all processes together know it: one line in the log for each change.

It belongs to the main process, which `SilentServers` tells of each server that a process could not reach, or could
again. A registry that changes all the time is logged a few times, and then only if its state lasts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from attrs import define, field
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.oci.docker_hub import DOCKER_HUB, canonical_registry
from dockerproxy.oci.names import Registry

_MAX_OTHERS = 64  # servers that the settings do not name
_MAX_NEW_OTHERS = 10  # of them in a minute, because clients may choose them if a wildcard of REGISTRIES covers them
MAX_OUTAGES = 4
"""Outages of a server in `OUTAGE_WINDOW` that are logged as soon as they begin."""
OUTAGE_WINDOW = 600.0  # seconds

_NOT_CONNECTED = "timed out, not connected"

log = Logger()


@define(eq=False)
class _Outages:
    """The outages of a server. `reason` is that of the present one, empty if the server answers."""

    name: str
    reason: str = ""
    since: float = 0.0  # POSIX time
    stale_before: int = 0  # the count at that time
    is_logged: bool = False  # whether the log has the outage
    outages: deque[float] = field(factory=lambda: deque(maxlen=MAX_OUTAGES))  # times of `clock`, of those logged
    delayed_log: Any = None


class RegistryStates:
    """The servers that do not answer. `clock` is the reactor, and `now` returns POSIX time.

    `is_listed` returns whether the settings name a server. `count_stale` returns how many stale answers a registry has
    caused so far, by the name that people write (`name_of`).
    """

    def __init__(
        self,
        clock: Any,
        now: Callable[[], float],
        is_listed: Callable[[Registry], bool],
        count_stale: Callable[[str], int],
    ) -> None:
        self._clock = clock
        self._now = now
        self._is_listed = is_listed
        self._count_stale = count_stale
        self._listed: dict[str, _Outages] = {}
        self._others: BoundedDict[str, _Outages] = BoundedDict(_MAX_OTHERS)
        self._new_others: deque[float] = deque(maxlen=_MAX_NEW_OTHERS)  # times at which one was added

    def report(self, origin: str, failure: str) -> None:
        """Note why the server at `origin` cannot be reached; `""` if it answers."""
        registry = Registry.parse(origin)
        server = self._listed.get(origin) or self._others.get(origin)
        if server is None:
            server = self._add(registry) if failure else None
        if server is None:
            return
        reason = _reason(registry, failure)
        if not reason:
            self._end_outage(server)
        elif server.reason:
            server.reason = reason
        else:
            server.reason, server.since, server.stale_before = reason, self._now(), self._count_stale(server.name)
            self._log_outage(server)

    def report_list(self) -> list[dict[str, Any]]:
        """Return the servers that do not answer, and since when (POSIX time), as a JSON value."""
        others = [server for origin in list(self._others) if (server := self._others.get(origin)) is not None]
        return [
            {"registry": server.name, "reason": server.reason, "since": server.since, "stale": self._stale(server)}
            for server in (*self._listed.values(), *others)
            if server.reason
        ]

    def _add(self, registry: Registry) -> _Outages | None:
        """Return a new server, or None if too many are new that the settings do not name."""
        server, now = _Outages(name_of(registry)), self._clock.seconds()
        if self._is_listed(registry):
            self._listed[registry.origin] = server
        elif len(self._new_others) == _MAX_NEW_OTHERS and now < self._new_others[0] + 60:
            return None
        else:
            self._new_others.append(now)
            self._others[registry.origin] = server
        return server

    def _log_outage(self, server: _Outages) -> None:
        server.delayed_log = None
        now, times = self._clock.seconds(), server.outages
        if len(times) == MAX_OUTAGES and now < times[0] + OUTAGE_WINDOW:
            server.delayed_log = self._clock.callLater(times[0] + OUTAGE_WINDOW - now, self._log_outage, server)
            return
        times.append(now)
        server.is_logged = True
        log.warn("{server} does not answer: {reason}; serving what is cached", server=server.name, reason=server.reason)

    def _end_outage(self, server: _Outages) -> None:
        if not server.reason:
            return
        server.reason = ""
        call, server.delayed_log = server.delayed_log, None
        if call is not None:
            call.cancel()
        if not server.is_logged:
            return
        server.is_logged = False
        duration, stale = _format_duration(self._now() - server.since), _format_stale(self._stale(server))
        log.warn("{server} answers again after {duration}, {stale}", server=server.name, duration=duration, stale=stale)

    def _stale(self, server: _Outages) -> int:
        return max(0, self._count_stale(server.name) - server.stale_before)


def name_of(server: Registry) -> str:
    """Return the name of a server as people write it: ``docker.io`` for Docker Hub under each of its names."""
    return "docker.io" if canonical_registry(server) == DOCKER_HUB else str(server)


def _reason(server: Registry, failure: str) -> str:
    """Return the sentence `failure` without the name of the server, which the line begins with."""
    reason = failure.removeprefix(f"{server.host.authority}: ")
    return "connection timed out" if reason.startswith(_NOT_CONNECTED) else reason


def _format_stale(stale: int) -> str:
    return f"{stale} answers were stale" if stale != 1 else "1 answer was stale"


def _format_duration(seconds: float) -> str:
    seconds = max(0, int(seconds))
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
