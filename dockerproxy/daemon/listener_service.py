"""The daemon's doors as a Twisted service: all of them listen, or the start fails; at the end, transfers may finish."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from attrs import frozen
from twisted.application.service import Service
from twisted.internet.defer import Deferred, TimeoutError, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.concurrency import spawn
from dockerproxy.daemon.endpoints import SocketNotPassed, format_address, listen
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.site import Site

SHUTDOWN_GRACE = 25.0
"""Seconds that transfers have to finish when the daemon stops (systemd kills after 30: TimeoutStopSec)."""

log = Logger()


@frozen
class Listener:
    """Where a site listens: the endpoint `descriptions` that are the value of `setting`.

    `entrance` is what is given the connections, if not the site itself.
    """

    setting: str
    descriptions: tuple[str, ...]
    site: Site
    factory: Factory | None = None


class ListenerService(Service):
    """Opens the doors at start, the first of them in any case.

    At stop: close them, let transfers finish for a while, then `close` what is behind.

    `on_repeat` is told at stop what to call when the daemon is asked to stop once more.
    """

    def __init__(
        self,
        reactor: Any,
        listeners: Sequence[Listener],
        transfers: Transfers,
        close_upstreams: Callable[[], Awaitable[None]],
        on_repeated_stop: Callable[[Callable[[], None]], None],
    ) -> None:
        self._reactor = reactor
        self._listeners = listeners
        self._transfers = transfers
        self._close_upstreams = close_upstreams
        self._on_repeated_stop = on_repeated_stop
        self._ports: list[IListeningPort] = []
        self.listening: Deferred[None] = Deferred()
        """Fires when every door is open."""

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        starting = Deferred.fromCoroutine(self._listen_on_all())
        result = getattr(starting, "result", None)
        if isinstance(result, Failure):
            starting.addErrback(lambda failure: None)
            raise SystemExit(f"docker-registry-proxy: {result.getErrorMessage()}")
        starting.addErrback(self._listen_failed)  # of an endpoint that takes its time

    def _listen_failed(self, failure: Failure) -> None:
        log.critical("{reason}", reason=failure.getErrorMessage())
        self._reactor.stop()

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        self._on_repeated_stop(self.abort)
        return Deferred.fromCoroutine(self._stop())

    def abort(self) -> None:
        """Break off at once what the stopping daemon still waits for."""
        log.warn("asked to stop once more: what is under way is broken off")
        for listener in self._listeners:
            listener.site.abort()
        spawn(self._transfers.drain(self._reactor, 0), "breaking off tunnels")

    async def _listen_on_all(self) -> None:
        for listener in self._listeners:
            try:
                ports = await listen(
                    self._reactor, listener.descriptions, listener.factory or listener.site, listener.setting
                )
            except SocketNotPassed as error:
                # Where another program has the port, systemd's socket fails. The proxy is of use without the others.
                if listener is self._listeners[0]:
                    raise
                log.warn("{reason}", reason=str(error))
                continue
            self._ports.extend(ports)
            for port in ports:
                log.info("listening on {address} ({setting})", address=format_address(port), setting=listener.setting)
        self.listening.callback(None)

    async def _stop(self) -> None:
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        deadline = self._reactor.seconds() + SHUTDOWN_GRACE
        aborted = 0
        for listener in self._listeners:
            aborted += await self._drain(listener.site, deadline)
        aborted += await self._transfers.drain(self._reactor, max(0.0, deadline - self._reactor.seconds()))
        if aborted:
            log.warn("{count} transfers were broken off after {grace} s", count=aborted, grace=SHUTDOWN_GRACE)
        await self._close_upstreams()

    async def _drain(self, site: Site, deadline: float) -> int:
        try:
            await site.drain().addTimeout(max(0.0, deadline - self._reactor.seconds()), self._reactor)
        except TimeoutError:
            return site.abort()
        return 0
