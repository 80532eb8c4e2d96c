"""Handing over of accepted connections from the main process to workers, one descriptor for each connection.

Shared listening sockets would need no hand-over, but spread connections unevenly, or cost more if a busy process holds
back from accepting (docs/architecture.md, "Decisions").
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

from attrs import define, field, frozen
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger

from dockerproxy.daemon.endpoints import listen
from dockerproxy.daemon.listener_service import Listener, log_listening
from dockerproxy.http.site import Site

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_LOSS_LOG_INTERVAL = 10.0  # seconds between two log lines about lost connections

log = Logger()

Dispatch = Callable[[str, socket.socket], bool]
"""Hands over a connection of the listener with a setting to a worker. Returns whether it did."""


@frozen
class DispatchingOpener:
    """Opens the ports of the main process. Their connections go to workers by `dispatch`.

    `count_local` is called with each connection that is served in this process.
    """

    _reactor: Any
    _dispatch: Dispatch
    _count_local: Callable[[], None]

    async def open(self, listener: Listener) -> Sequence[IListeningPort]:
        """Listen on all endpoints of `listener`. Raise `ListenError`."""
        factory = ConnectionDispatcher(listener, self._dispatch, self._count_local)
        ports = await listen(self._reactor, listener.descriptions, factory, listener.setting)
        log_listening(listener, ports)
        return ports


class ConnectionDispatcher(Factory):
    """Hands over the connections of `listener`. Its site serves those that `dispatch` does not take."""

    noisy = False

    def __init__(self, listener: Listener, dispatch: Dispatch, count_local: Callable[[], None]) -> None:
        self._listener = listener
        self._dispatch = dispatch
        self._count_local = count_local

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _PendingConnection(self)

    def on_accepted(self, transport: Any) -> Protocol | None:
        """Hand over the connection. If no worker takes it, return the protocol that serves it in this process."""
        sock: socket.socket = transport.getHandle()
        if sock.family in _FAMILIES and self._dispatch(self._listener.setting, sock):
            # Close only the descriptor. Twisted would call shutdown(), which closes the connection in the worker too.
            transport.stopReading()
            sock.close()
            return None
        self._count_local()
        return self._listener.site.buildProtocol(transport.getPeer())


class _PendingConnection(Protocol):
    def __init__(self, dispatcher: ConnectionDispatcher) -> None:
        self._dispatcher = dispatcher

    def connectionMade(self) -> None:
        tcp: Any = self.transport
        protocol: IProtocol | None = self._dispatcher.on_accepted(tcp)
        if protocol is not None:
            tcp.protocol = protocol
            protocol.makeConnection(tcp)


class NoPorts:
    """The opener of a worker, which listens on no port."""

    async def open(self, listener: Listener) -> Sequence[IListeningPort]:
        """Open nothing."""
        return ()


@define
class ConnectionReceiver:
    """Receives connections from the main process, and gives each to the site of its listener (`sites`, by setting)."""

    _reactor: Any
    _sites: dict[str, Site]
    _on_closed: Callable[[], None]
    _lost: int = field(default=0, init=False)
    _next_log: float = field(default=0.0, init=False)

    def __call__(self, setting: str, descriptor: int | None) -> None:
        """Serve the connection `descriptor`. None means that the kernel dropped it at this process's limit of files."""
        if descriptor is None:
            self._on_closed()
            self._count_lost()
            return
        try:
            with socket.socket(fileno=descriptor) as sock:  # adoptStreamConnection duplicates the descriptor
                self._reactor.adoptStreamConnection(descriptor, sock.family, self._sites[setting])
        except OSError:  # the client has already disconnected, or this process has too many open files
            self._on_closed()

    def _count_lost(self) -> None:
        self._lost += 1
        if self._reactor.seconds() >= self._next_log:
            self._next_log = self._reactor.seconds() + _LOSS_LOG_INTERVAL
            log.error("lost {count} connections since the start: too many open files; raise LimitNOFILE=",
                      count=self._lost)  # fmt: skip
