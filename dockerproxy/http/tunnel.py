"""Tunnels: they copy bytes between two connections without looking at them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from typing import Protocol as TypingProtocol

from attrs import frozen
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from dockerproxy.http.request import Request
from dockerproxy.http.transport import limit_unsent

_CHECK_INTERVAL = 60.0  # seconds


@frozen
class TunnelTimeouts:
    """Limits in seconds: to connect, without a byte received, without a byte sent."""

    connect: float = 60.0
    read: float = 60.0
    send: float = 60.0


class Tunnel:
    """Two connections that receive each other's bytes.

    Back-pressure applies in both directions. If one side closes or half-closes its connection, the other is closed once
    all pending data has been written. If no byte moves in either direction for too long, both are aborted, and within a
    minute if `may_go_on` returns False. `on_closed` is called once, with the number of bytes sent to the client.
    """

    def __init__(
        self, clock: Any, timeouts: TunnelTimeouts, on_closed: Callable[[int], None], may_go_on: Callable[[], bool]
    ) -> None:
        self._clock = clock
        self._idle_timeout = max(timeouts.read, timeouts.send)
        self._on_closed = on_closed
        self._may_go_on = may_go_on
        self._last_activity = clock.seconds()
        self._timer: Any = None
        self.client = _TunnelSide(self)
        self.server = _TunnelSide(self)
        self.client.peer, self.server.peer = self.server, self.client

    def start(self) -> None:
        """Start copying. Both sides must be connected."""
        limit_unsent(self.server.transport.getHandle())  # a server that reads nothing may be the client's accomplice
        self.client.transport.registerProducer(self.server.transport, True)
        self.server.transport.registerProducer(self.client.transport, True)
        self.client.start()
        self.server.start()
        self._schedule_check(0)

    def abort(self) -> None:
        """Abort both connections."""
        for side in (self.client, self.server):
            if side.transport is not None:
                side.transport.abortConnection()

    def touch(self) -> None:
        self._last_activity = self._clock.seconds()

    def on_connection_lost(self) -> None:
        self.touch()
        if self.client.disconnected and self.server.disconnected:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()
            self._on_closed(self.server.bytes_received)

    def _check(self) -> None:
        self._timer = None
        idle = self._clock.seconds() - self._last_activity
        if idle >= self._idle_timeout or not self._may_go_on():
            self.abort()
        else:
            self._schedule_check(idle)

    def _schedule_check(self, idle: float) -> None:
        self._timer = self._clock.callLater(min(self._idle_timeout - idle, _CHECK_INTERVAL), self._check)


class TransferTracker(TypingProtocol):
    """Tracks open tunnels, and TLS within the proxy's TLS, so that the daemon can wait for them when it stops."""

    def add(self, abort: Callable[[], None]) -> Any: ...

    def remove(self, handle: Any) -> None: ...


@frozen
class Tunnels:
    """Opens tunnels between clients and other servers.

    `transfers` knows those that are open. `may_go_on` returns whether one may go on that this user of the proxy opened,
    None for a client without a login. `on_request_finished` is called when a tunnel has ended, with the request that
    opened it and the seconds since then.
    """

    clock: Any
    timeouts: TunnelTimeouts
    transfers: TransferTracker
    may_go_on: Callable[[str | None], bool]
    on_request_finished: Callable[[Request, float], None]

    async def open(
        self, request: Request, status: int, head: bytes, connect: Callable[[IProtocol], Awaitable[object]]
    ) -> None:
        """Turn the connection of `request` into a tunnel. `connect` attaches a protocol to that of the server.

        The client then gets `head`, the head of a response with `status`. Raise the errors of `connect`, after which
        the request can still be answered.
        """
        started_at = self.clock.seconds()

        def on_closed(size: int) -> None:
            request.bytes_sent = size
            self.transfers.remove(transfer)
            self.on_request_finished(request, self.clock.seconds() - started_at)

        tunnel = Tunnel(self.clock, self.timeouts, on_closed, partial(self.may_go_on, request.proxy_user))
        await connect(tunnel.server)
        try:
            transport, received = request.detach()
        except BaseException:
            tunnel.abort()
            raise
        request.status, request.cache_status = status, "PASS"
        transfer = self.transfers.add(tunnel.abort)
        transport.write(head)
        transport.set_protocol(tunnel.client)
        if received:
            tunnel.client.dataReceived(received)
        tunnel.start()


class _TunnelSide(Protocol):
    """The protocol of one connection. Data that arrives before the tunnel starts is buffered."""

    transport: Any
    peer: _TunnelSide

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._early_data: list[bytes] | None = []
        self.disconnected = False
        self.bytes_received = 0

    def start(self) -> None:
        early_data, self._early_data = self._early_data, None
        for data in early_data or []:
            self.peer.transport.write(data)

    def dataReceived(self, data: bytes) -> None:
        self._tunnel.touch()
        self.bytes_received += len(data)
        if self._early_data is not None:
            self._early_data.append(data)
        else:
            self.peer.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.disconnected = True
        if self.peer.transport is not None and not self.peer.disconnected:
            self.peer.transport.unregisterProducer()
            self.peer.transport.loseConnection()
        self._tunnel.on_connection_lost()
