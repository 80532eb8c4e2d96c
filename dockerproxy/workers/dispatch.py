"""Connections on their way from the process that accepts them to the one that serves them."""

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
"""Passes a connection on, and says whether it did; see `Crew.pass_on`."""


class ConnectionDispatcher(Factory):
    """Takes the connections of the door `number`; those that `pass_on` does not pass on are served here, by `site`."""

    noisy = False

    def __init__(self, number: int, site: Site, dispatch: DispatchConnection) -> None:
        self._number = number
        self._site = site
        self._dispatch = dispatch

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _PendingConnection(self)

    def on_accepted(self, transport: Any) -> Protocol | None:
        """Pass a connection on; return the protocol that serves it here, where that could not be."""
        sock: socket.socket = transport.getHandle()
        if not self._dispatch(bytes([self._number, sock.family]), sock if sock.family in _FAMILIES else None):
            return self._site.buildProtocol(transport.getPeer())
        # Closed as a descriptor only: Twisted would shut the connection down, which the other process now has.
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
    """Takes in the connections that are passed on to this process, for the `sites` of the doors by their number."""

    def __init__(self, reactor: Any, sites: Sequence[Site], on_closed: Callable[[], None]) -> None:
        self._reactor = reactor
        self._sites = sites
        self._on_closed = on_closed

    def __call__(self, label: bytes, descriptor: int) -> None:
        number, family = label
        try:
            # Twisted makes a copy of the descriptor.
            self._reactor.adoptStreamConnection(descriptor, family, self._sites[number])
        except OSError:  # the client has left already
            self._on_closed()
        finally:
            os.close(descriptor)
