"""A tunnel: the bytes of two connections passed across, unread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure


@frozen
class TunnelTimeouts:
    """Seconds: until connected, without a byte in either direction, without a byte taken."""

    connect: float = 60.0
    read: float = 60.0
    send: float = 60.0


class Tunnel:
    """Two connections, each of which gets what the other sends.

    Whichever end is slow holds the other back. When one closes, or only says that it has no more to send, the other is
    closed after what is on its way. When neither sends nor takes a byte for too long, both are. `ended` is called once,
    with the bytes that went to the client.
    """

    def __init__(self, clock: Any, timeouts: TunnelTimeouts, ended: Callable[[int], None]) -> None:
        self._clock = clock
        self._idle = max(timeouts.read, timeouts.send)
        self._ended = ended
        self._last = clock.seconds()
        self._timer: Any = None
        self.client = _End(self)
        self.server = _End(self)
        self.client.peer, self.server.peer = self.server, self.client

    def open(self) -> None:
        """Begin: both ends are connected."""
        self.client.transport.registerProducer(self.server.transport, True)
        self.server.transport.registerProducer(self.client.transport, True)
        self.client.begin()
        self.server.begin()
        self._timer = self._clock.callLater(self._idle, self._check)

    def abort(self) -> None:
        """Close both ends now."""
        for end in (self.client, self.server):
            if end.transport is not None:
                end.transport.abortConnection()

    def passed(self) -> None:
        self._last = self._clock.seconds()

    def lost(self) -> None:
        self.passed()
        if self.client.lost and self.server.lost:
            timer, self._timer = self._timer, None
            if timer is not None:
                timer.cancel()
            self._ended(self.server.received)

    def _check(self) -> None:
        self._timer = None
        quiet = self._clock.seconds() - self._last
        if quiet >= self._idle:
            self.abort()
        else:
            self._timer = self._clock.callLater(self._idle - quiet, self._check)


class _End(Protocol):
    """One end; what arrives before the other end is there waits."""

    transport: Any
    peer: _End

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel
        self._early: list[bytes] | None = []
        self.lost = False
        self.received = 0

    def begin(self) -> None:
        early, self._early = self._early, None
        for data in early or []:
            self.peer.transport.write(data)

    def dataReceived(self, data: bytes) -> None:
        self._tunnel.passed()
        self.received += len(data)
        if self._early is not None:
            self._early.append(data)
        else:
            self.peer.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = True
        if self.peer.transport is not None and not self.peer.lost:
            self.peer.transport.unregisterProducer()
            self.peer.transport.loseConnection()
        self._tunnel.lost()


class ToEnd(Factory):
    """Makes the one protocol that it was made with: a tunnel's far end."""

    noisy = False

    def __init__(self, end: Protocol) -> None:
        self._end = end

    def buildProtocol(self, address: object) -> Protocol:
        return self._end
