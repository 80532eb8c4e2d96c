"""The service that opens the daemon's listening ports at start-up and drains their connections at shutdown."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from attrs import frozen
from twisted.application.service import Service
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred, TimeoutError, gatherResults, maybeDeferred
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger
from twisted.python.failure import Failure

from dockerproxy.concurrency import spawn
from dockerproxy.daemon.endpoints import SocketNotPassed, format_address, listen
from dockerproxy.daemon.transfers import Transfers
from dockerproxy.http.site import Site

SHUTDOWN_GRACE = 25.0
"""Seconds that transfers have to finish when the daemon stops; systemd sends SIGKILL after 30 (TimeoutStopSec=)."""

log = Logger()


@frozen
class Listener:
    """A site and the endpoints it listens on: `descriptions`, the value of `setting`."""

    setting: str
    descriptions: tuple[str, ...]
    site: Site


@frozen
class OpenPort:
    """A port of `setting` that is open at `host` (`""`: all addresses). If `secure`, connections begin with TLS."""

    setting: str
    host: str
    number: int
    secure: bool


class PortOpener(Protocol):
    """Opens the ports of a listener."""

    async def open(self, listener: Listener) -> Sequence[IListeningPort]:
        """Return ports that accept connections for `listener`. Raise `ListenError`."""
        ...


@frozen
class EndpointOpener:
    """Opens the endpoints that the settings describe. `factory_for` returns the factory that accepts connections."""

    _reactor: Any
    _factory_for: Callable[[Listener], IProtocolFactory]

    async def open(self, listener: Listener) -> Sequence[IListeningPort]:
        """Listen on all endpoints of `listener`. Raise `ListenError`."""
        ports = await listen(self._reactor, listener.descriptions, self._factory_for(listener), listener.setting)
        for port in ports:
            log.info("listening on {address} ({setting})", address=format_address(port), setting=listener.setting)
        return ports


class ListenerService(Service):
    """Opens the ports of all listeners at start-up by `opener`, and drains connections at shutdown.

    Start-up fails if listening on an endpoint fails. One exception: a systemd socket that was not passed is only
    logged, unless it belongs to the first listener.

    Shutdown closes the ports, then idle connections, and the others after their response. It waits up to
    `SHUTDOWN_GRACE` seconds for responses and tunnels, aborts the rest, then awaits `close_upstreams`.
    `on_repeated_stop` is called when the shutdown begins, with a function that aborts all transfers: the callback to
    run at the next stop signal.
    """

    def __init__(
        self,
        reactor: Any,
        listeners: Sequence[Listener],
        opener: PortOpener,
        transfers: Transfers,
        close_upstreams: Callable[[], Awaitable[None]],
        on_repeated_stop: Callable[[Callable[[], None]], None],
    ) -> None:
        self._reactor = reactor
        self._listeners = listeners
        self._opener = opener
        self._transfers = transfers
        self._close_upstreams = close_upstreams
        self._on_repeated_stop = on_repeated_stop
        self._ports: list[tuple[Listener, IListeningPort]] = []
        self.listening: Deferred[None] = Deferred()
        """Fires when all ports are open."""

    @property
    def open_ports(self) -> list[OpenPort]:
        """The TCP ports that are open."""
        addresses = [(listener, port.getHost()) for listener, port in self._ports]
        return [
            OpenPort(listener.setting, str(address.host), address.port, listener.site.secure)
            for listener, address in addresses
            if isinstance(address, IPv4Address | IPv6Address)
        ]

    def report(self) -> list[dict[str, str]]:
        """Return the open ports: the setting and the address of each."""
        return [{"setting": listener.setting, "address": format_address(port)} for listener, port in self._ports]

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        starting = Deferred.fromCoroutine(self._listen_on_all())
        result = getattr(starting, "result", None)
        if isinstance(result, Failure):
            starting.addErrback(lambda failure: None)
            raise SystemExit(f"docker-registry-proxy: {result.getErrorMessage()}")
        starting.addErrback(self._listen_failed)  # an endpoint may fail later

    def _listen_failed(self, failure: Failure) -> None:
        log.critical("{reason}", reason=failure.getErrorMessage())
        self._reactor.stop()

    def stopService(self) -> Deferred[None]:
        super().stopService()  # type: ignore[no-untyped-call]
        self._on_repeated_stop(self.abort)
        return Deferred.fromCoroutine(self._stop())

    def abort(self) -> None:
        """Abort all connections and tunnels that the shutdown waits for."""
        log.warn("received another stop signal: aborting all transfers")
        for listener in self._listeners:
            listener.site.abort()
        spawn(self._transfers.drain(self._reactor, 0), "aborting tunnels")

    async def _listen_on_all(self) -> None:
        for listener in self._listeners:
            try:
                self._ports.extend((listener, port) for port in await self._opener.open(listener))
            except SocketNotPassed as error:
                # If another program occupies the port, systemd's socket unit fails. The proxy works without that port.
                if listener is self._listeners[0]:
                    raise
                log.warn("{reason}", reason=str(error))
        self.listening.callback(None)

    async def _stop(self) -> None:
        for _, port in self._ports:
            await maybeDeferred(port.stopListening)
        # All sites drain from now on, so that a busy one does not let the clients of the others send new requests.
        drains = [Deferred.fromCoroutine(self._drain(listener.site)) for listener in self._listeners]
        drains.append(Deferred.fromCoroutine(self._transfers.drain(self._reactor, SHUTDOWN_GRACE)))
        aborted = sum(await gatherResults(drains))
        if aborted:
            log.warn(
                "aborted {count} transfers that had not finished {grace} s after the stop signal",
                count=aborted,
                grace=SHUTDOWN_GRACE,
            )
        await self._close_upstreams()

    async def _drain(self, site: Site) -> int:
        try:
            await site.drain().addTimeout(SHUTDOWN_GRACE, self._reactor)
        except TimeoutError:
            return site.abort()
        return 0
