"""Handing over of accepted connections from the main process to workers, one descriptor for each connection.

Shared listening sockets would need no hand-over, but spread connections unevenly, or cost more if a busy process holds
back from accepting (docs/architecture.md, "Decisions").
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from attrs import define, field
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger

from dockerproxy.daemon.listener_service import Listener
from dockerproxy.errors import RegistryError
from dockerproxy.http.message import MAX_HEAD, reason_phrase, render_head
from dockerproxy.http.request import PLAIN_TEXT
from dockerproxy.http.security_fields import SECURITY_FIELDS
from dockerproxy.http.site import Site
from dockerproxy.workers.connection_table import ConnectionTable

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_LOCAL_CLIENT = "-"  # of a Unix socket
_LOSS_LOG_INTERVAL = 10.0  # seconds between two log lines about lost connections

log = Logger()

Dispatch = Callable[[str, socket.socket, str], bool]
"""Hands over a connection of the listener with a setting, and of a client, to a worker. Returns whether it did."""


class ConnectionDispatcher(Factory):
    """Accepts the connections of `listener` that `table` has room for.

    It hands them over to workers by `dispatch`. The site of the listener serves those that `dispatch` does not take.
    """

    noisy = False

    def __init__(self, listener: Listener, table: ConnectionTable, dispatch: Dispatch) -> None:
        self._listener = listener
        self._table = table
        self._dispatch = dispatch

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _PendingConnection(self)

    def on_accepted(self, transport: Any) -> Protocol | None:
        """Hand over the connection or refuse it. Otherwise return the protocol that serves it in this process."""
        sock: socket.socket = transport.getHandle()
        client = str(getattr(transport.getPeer(), "host", _LOCAL_CLIENT))
        error = self._table.refusal(client)
        if error is not None:
            self._refuse(transport, sock, error)
            return None
        if sock.family in _FAMILIES and self._dispatch(self._listener.setting, sock, client):
            # Close only the descriptor. Twisted would call shutdown(), which closes the connection in the worker too.
            transport.stopReading()
            sock.close()
            return None
        on_closed = self._table.serve_here(client)
        return self._listener.site.connection_protocol(on_closed)

    def _refuse(self, transport: Any, sock: socket.socket, error: RegistryError) -> None:
        """Send `error`, unless a TLS handshake would have to come first, and close."""
        transport.stopReading()
        with suppress(OSError):
            if not self._listener.site.secure:
                with suppress(BlockingIOError):
                    sock.recv(MAX_HEAD)  # closing a socket with unread data resets it, and the response is lost
                sock.send(_render_refusal(error))
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def _render_refusal(error: RegistryError) -> bytes:
    body = f"{error.message}\n".encode()
    fields = [PLAIN_TEXT, ("Content-Length", str(len(body))), *error.headers, ("Connection", "close")]
    return render_head(error.status, fields, SECURITY_FIELDS, reason=reason_phrase(error.message)) + body


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

    async def open(self, listener: Listener) -> tuple[IListeningPort, ...]:
        """Open nothing."""
        return ()


@define
class ConnectionReceiver:
    """Receives connections from the main process, and gives each to the site of its listener (`sites`, by setting).

    `on_closed` is called when one has closed, with the number that came with it: the index of its client's counter.
    """

    _reactor: Any
    _sites: Mapping[str, Site]
    _on_closed: Callable[[int], None]
    _lost: int = field(default=0, init=False)
    _next_log: float = field(default=0.0, init=False)

    def __call__(self, message: tuple[str, int], descriptor: int | None) -> None:
        """Serve the connection `descriptor`. None means that the kernel dropped it at this process's limit of files."""
        setting, index = message
        if descriptor is None:
            self._on_closed(index)
            self._count_lost()
            return
        factory = _ReceivedConnection(self._sites[setting], partial(self._on_closed, index))
        try:
            with socket.socket(fileno=descriptor) as sock:  # adoptStreamConnection duplicates the descriptor
                self._reactor.adoptStreamConnection(descriptor, sock.family, factory)
        except OSError:  # the client has already disconnected, or this process has too many open files
            self._on_closed(index)

    def _count_lost(self) -> None:
        self._lost += 1
        if self._reactor.seconds() >= self._next_log:
            self._next_log = self._reactor.seconds() + _LOSS_LOG_INTERVAL
            log.error("lost {count} connections since the start: too many open files; raise LimitNOFILE=",
                      count=self._lost)  # fmt: skip


class _ReceivedConnection(Factory):
    """The factory for a single connection of `site`."""

    noisy = False

    def __init__(self, site: Site, on_closed: Callable[[], None]) -> None:
        self._site = site
        self._on_closed = on_closed

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return self._site.connection_protocol(self._on_closed)
