"""Servers that did not let us connect a moment ago, so that only one request waits for the time-out.

A firewall that drops packets costs each request the whole time-out, and a cached image has many of them. Only attempts
to connect count: no request has been sent yet, so no client can make a server look silent to others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any, TypeVar

from attrs import define
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.errors import DestinationForbidden, UpstreamError, UpstreamTimeout

SILENCE_TTL = 30.0
"""Seconds for which a failed attempt to connect counts for other requests."""

PROBE_INTERVAL = 5.0
"""Seconds from a failed attempt until a request starts the next one, in the background."""

_SLOW = 1.0  # seconds; a server that refuses at once makes nobody wait, and may be back at any moment
_MAX_SERVERS = 256

log = Logger()
T = TypeVar("T")


@define
class _Server:
    """The last attempts to connect to a server. Times are `clock.seconds()`."""

    name: str
    connected_at: float = 0.0
    failed_at: float = 0.0
    error: UpstreamError | None = None  # None if it answers
    probe: Deferred[None] | None = None


class SilentServers:
    """Remembers servers that do not answer. Each process has its own."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self._servers: BoundedDict[Hashable, _Server] = BoundedDict(_MAX_SERVERS)
        self._probes: set[Deferred[None]] = set()

    async def connect(
        self,
        key: Hashable,
        name: str,
        attempt: Callable[[], Coroutine[Any, Any, T]],
        on_probe_connected: Callable[[T], object],
    ) -> T:
        """Return the connection that `attempt` makes to the server `name`. Raise its error.

        If an attempt with this `key` failed after a wait a moment ago, raise that error at once. One request then makes
        another attempt in the background, and `on_probe_connected` gets the connection.
        """
        server = self._servers.get(key)
        if server is None:
            server = self._servers[key] = _Server(name)
        error = server.error
        if error is None or (server.probe is None and self._clock.seconds() - server.failed_at >= SILENCE_TTL):
            return await self._attempt(server, attempt)
        seconds = self._clock.seconds() - server.failed_at
        if server.probe is None and seconds >= PROBE_INTERVAL:
            self._start_probe(server, attempt, on_probe_connected)
        raise type(error)(f"{error.message} (tried {seconds:.0f} s ago, and again in the background)")

    def close(self) -> None:
        """Cancel the attempts in the background."""
        for probe in list(self._probes):
            probe.cancel()

    async def _attempt(self, server: _Server, attempt: Callable[[], Awaitable[T]]) -> T:
        started = self._clock.seconds()
        try:
            connection = await attempt()
        except DestinationForbidden:
            raise
        except UpstreamError as error:
            now = self._clock.seconds()
            is_slow = isinstance(error, UpstreamTimeout) or now - started >= _SLOW
            if is_slow and server.connected_at <= started:  # else another attempt has succeeded since
                if server.error is None:
                    log.warn(
                        "{server} does not answer ({reason}); requests get what is cached, at once, until it does",
                        server=server.name, reason=error.message,
                    )  # fmt: skip
                server.error, server.failed_at = error, now
            elif not is_slow:
                server.error = None
            raise
        if server.error is not None:
            log.info("{server} answers again", server=server.name)
        server.error, server.connected_at = None, self._clock.seconds()
        return connection

    def _start_probe(
        self, server: _Server, attempt: Callable[[], Awaitable[T]], on_connected: Callable[[T], object]
    ) -> None:
        async def run() -> None:
            try:
                on_connected(await self._attempt(server, attempt))
            except (UpstreamError, CancelledError):
                pass
            finally:
                server.probe = None

        server.probe = probe = Deferred.fromCoroutine(run())
        if probe.called:
            server.probe = None
            return
        self._probes.add(probe)
        probe.addErrback(lambda failure: log.failure("connecting to {server} failed", failure, server=server.name))
        probe.addBoth(lambda _: self._probes.discard(probe))
