"""Passing of accepted connections from the main process to workers."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IAddress, IProtocol
from twisted.internet.protocol import Factory, Protocol

from dockerproxy.http.site import Site

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


DispatchConnection = Callable[[bytes, socket.socket | None], bool]
"""Passes a connection to a worker. Returns whether it did; see `WorkerSupervisor.dispatch`."""


class ConnectionDispatcher(Factory):
    """Passes the connections of listener `number` to `dispatch`. If it returns False, `site` serves the connection."""

    noisy = False

    def __init__(self, number: int, site: Site, dispatch: DispatchConnection) -> None:
        self._number = number
        self._site = site
        self._dispatch = dispatch

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _PendingConnection(self)

    def on_accepted(self, transport: Any) -> Protocol | None:
        """Pass the connection to a worker. If none takes it, return the protocol that serves it in this process."""
        sock: socket.socket = transport.getHandle()
        if not self._dispatch(bytes([self._number, sock.family]), sock if sock.family in _FAMILIES else None):
            return self._site.buildProtocol(transport.getPeer())
        # Close only the descriptor. Twisted would call shutdown(), which closes the connection in the worker as well.
        transport.stopReading()
        sock.close()
        return None


class _PendingConnection(Protocol):
    def __init__(self, dispatcher: ConnectionDispatcher) -> None:
        self._dispatcher = dispatcher

    def connectionMade(self) -> None:
        tcp: Any = self.transport
        protocol: IProtocol | None = self._dispatcher.on_accepted(tcp)
        if protocol is not None:
            tcp.protocol = protocol
            protocol.makeConnection(tcp)


class ConnectionReceiver:
    """Receives connections from the main process and hands each to the site of its listener (`sites` by number)."""

    def __init__(self, reactor: Any, sites: Sequence[Site], on_closed: Callable[[], None]) -> None:
        self._reactor = reactor
        self._sites = sites
        self._on_closed = on_closed

    def __call__(self, label: bytes, descriptor: int) -> None:
        number, family = label
        try:
            # adoptStreamConnection duplicates the descriptor.
            self._reactor.adoptStreamConnection(descriptor, family, self._sites[number])
        except OSError:  # the client has already disconnected
            self._on_closed()
        finally:
            os.close(descriptor)
