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


PassOn = Callable[[bytes, socket.socket | None], bool]
"""Passes a connection on, and says whether it did; see `Crew.pass_on`."""


class PassingOn(Factory):
    """Takes the connections of the door `number`; those that `pass_on` does not pass on are served here, by `site`."""

    noisy = False

    def __init__(self, number: int, site: Site, pass_on: PassOn) -> None:
        self._number = number
        self._site = site
        self._pass_on = pass_on

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _Arrival(self)

    def arrived(self, tcp: Any) -> Protocol | None:
        """Pass a connection on; return the protocol that serves it here, where that could not be."""
        handle: socket.socket = tcp.getHandle()
        if not self._pass_on(bytes([self._number, handle.family]), handle if handle.family in _FAMILIES else None):
            return self._site.buildProtocol(tcp.getPeer())
        # Closed as a descriptor only: Twisted would shut the connection down, which the other process now has.
        tcp.stopReading()
        handle.close()
        return None


class _Arrival(Protocol):
    def __init__(self, passing: PassingOn) -> None:
        self._passing = passing

    def connectionMade(self) -> None:
        tcp: Any = self.transport
        protocol: IProtocol | None = self._passing.arrived(tcp)
        if protocol is not None:
            tcp.protocol = protocol
            protocol.makeConnection(tcp)


class Taking:
    """Takes in the connections that are passed on to this process, for the `sites` of the doors by their number."""

    def __init__(self, reactor: Any, sites: Sequence[Site], gone: Callable[[], None]) -> None:
        self._reactor = reactor
        self._sites = sites
        self._gone = gone

    def __call__(self, label: bytes, descriptor: int) -> None:
        number, family = label
        try:
            # Twisted makes a copy of the descriptor.
            self._reactor.adoptStreamConnection(descriptor, family, self._sites[number])
        except OSError:  # the client has left already
            self._gone()
        finally:
            os.close(descriptor)
