"""TLS within TLS: a client that reaches the proxy over TLS opens a tunnel, and begins the TLS of a registry in it.

OpenSSL reads and writes a socket of its own (`TLSTransport`), so the inner TLS gets one end of a socket pair. A relay
copies between the other end and the outer TLS::

    client ══ outer TLSTransport ── relay ── socket pair ── inner TLSTransport ── HTTPChannel

Back-pressure passes through: each side reads only while the other accepts. The kernel buffers of the pair are small.
Time limits are those of the inner channel, which sees progress only while the relay makes some.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from dockerproxy.http.transport import SocketTransport

_BUFFER = 64 * 1024  # bytes that the kernel may buffer in the pair, in each direction
_FLUSH_TIMEOUT = 60.0  # seconds in which a client must read something of the last bytes


def open_inner_socket(outer: SocketTransport, received: bytes, on_closed: Callable[[], None]) -> PairEnd:
    """Relay between `outer`, a transport with TLS, and a new socket; return that socket for the inner TLS.

    `received` is the start of the inner stream that was read with the request head. `on_closed` is called when the
    client has its last bytes, or is gone: the inner connection ends earlier.
    """
    near, far = socket.socketpair()
    for end in (near, far):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    _Relay(outer, SocketTransport(outer.reactor, PairEnd(near, outer)), received, on_closed)
    return PairEnd(far, outer)


class PairEnd:
    """One end of a socket pair, with the methods of Twisted's transport that `SocketTransport` uses.

    Its addresses are those of the outer connection.
    """

    def __init__(self, handle: socket.socket, outer: SocketTransport) -> None:
        self._socket = handle
        self._peer, self._host = outer.getPeer(), outer.getHost()

    def getHandle(self) -> socket.socket:
        return self._socket

    def getPeer(self) -> IAddress:
        return self._peer

    def getHost(self) -> IAddress:
        return self._host

    def connectionLost(self, reason: Failure) -> None:
        self._socket.close()


class _Relay:
    """Copies bytes between the outer TLS and the pair. If one ends, the other is closed."""

    def __init__(
        self, outer: SocketTransport, pair: SocketTransport, received: bytes, on_closed: Callable[[], None]
    ) -> None:
        self._outer, self._pair = outer, pair
        self._on_closed = on_closed
        self._flush_timer: Any = None
        outer.set_protocol(_RelaySide(pair, self._on_outer_lost))
        pair.set_protocol(_RelaySide(outer, self._on_pair_lost))
        outer.registerProducer(pair, True)
        pair.registerProducer(outer, True)
        pair.write(received)

    def _on_pair_lost(self) -> None:
        if self._outer.connected:
            self._outer.unregisterProducer()
            self._outer.loseConnection()
            self._await_flush()

    def _on_outer_lost(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        self._pair.unregisterProducer()
        self._pair.abortConnection()
        self._on_closed()

    def _await_flush(self) -> None:
        self._flush_timer = self._outer.reactor.callLater(_FLUSH_TIMEOUT, self._check_flush, self._outer.sent)

    def _check_flush(self, sent_before: int) -> None:
        self._flush_timer = None
        if self._outer.sent == sent_before:
            self._outer.abortConnection()
        else:
            self._await_flush()


class _RelaySide(Protocol):
    def __init__(self, other: SocketTransport, on_lost: Callable[[], None]) -> None:
        self._other = other
        self._on_lost = on_lost

    def dataReceived(self, data: bytes) -> None:
        self._other.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._on_lost()
