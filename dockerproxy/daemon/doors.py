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

from dockerproxy.daemon.listeners import NotHandedIn, listen, where
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.site import Site
from dockerproxy.tasks import spawn

GRACE = 25.0
"""Seconds that transfers have to finish when the daemon stops (systemd kills after 30: TimeoutStopSec)."""

log = Logger()


@frozen
class Door:
    """Where a site listens: the endpoint `descriptions` that are the value of `setting`.

    `entrance` is what is given the connections, if not the site itself.
    """

    setting: str
    descriptions: tuple[str, ...]
    site: Site
    entrance: Factory | None = None


class Doors(Service):
    """Opens the doors at start, the first of them in any case.

    At stop: close them, let transfers finish for a while, then `close` what is behind.

    `on_repeat` is told at stop what to call when the daemon is asked to stop once more.
    """

    def __init__(
        self,
        reactor: Any,
        doors: Sequence[Door],
        transfers: Transfers,
        close: Callable[[], Awaitable[None]],
        on_repeat: Callable[[Callable[[], None]], None],
    ) -> None:
        self._reactor = reactor
        self._doors = doors
        self._transfers = transfers
        self._close = close
        self._on_repeat = on_repeat
        self._ports: list[IListeningPort] = []
        self.opened: Deferred[None] = Deferred()
        """Fires when every door is open."""

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        opening = Deferred.fromCoroutine(self._open())
        opened = getattr(opening, "result", None)
        if isinstance(opened, Failure):
            opening.addErrback(lambda failure: None)
            raise SystemExit(f"docker-registry-proxy: {opened.getErrorMessage()}")
        opening.addErrback(self._stay_shut)  # of an endpoint that takes its time

    def _stay_shut(self, failure: Failure) -> None:
        log.critical("{why}", why=failure.getErrorMessage())
        self._reactor.stop()

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        self._on_repeat(self.hurry)
        return Deferred.fromCoroutine(self._stop())

    def hurry(self) -> None:
        """Break off at once what the stopping daemon still waits for."""
        log.warn("asked to stop once more: what is under way is broken off")
        for door in self._doors:
            door.site.abort()
        spawn(self._transfers.drain(self._reactor, 0), "breaking off tunnels")

    async def _open(self) -> None:
        for door in self._doors:
            try:
                ports = await listen(self._reactor, door.descriptions, door.entrance or door.site, door.setting)
            except NotHandedIn as error:
                # Where another program has the port, systemd's socket fails. The proxy is of use without the others.
                if door is self._doors[0]:
                    raise
                log.warn("{why}", why=str(error))
                continue
            self._ports.extend(ports)
            for port in ports:
                log.info("listening on {where} ({setting})", where=where(port), setting=door.setting)
        self.opened.callback(None)

    async def _stop(self) -> None:
        for port in self._ports:
            await maybeDeferred(port.stopListening)
        ends = self._reactor.seconds() + GRACE
        aborted = 0
        for door in self._doors:
            aborted += await self._drain(door.site, ends)
        aborted += await self._transfers.drain(self._reactor, max(0.0, ends - self._reactor.seconds()))
        if aborted:
            log.warn("{count} transfers were broken off after {grace} s", count=aborted, grace=GRACE)
        await self._close()

    async def _drain(self, site: Site, ends: float) -> int:
        try:
            await site.drain().addTimeout(max(0.0, ends - self._reactor.seconds()), self._reactor)
        except TimeoutError:
            return site.abort()
        return 0
