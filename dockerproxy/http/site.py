"""A door's site: the connections that it has, and how they come and go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.timeouts import TimeoutReaper
from dockerproxy.http.tls import ServerContext, TLSTransport
from dockerproxy.http.transport import DetachedProtocol, SocketTransport


@frozen
class ServerTimeouts:
    """Seconds that a client may keep us waiting: between requests, for a head, for more of a body, to take bytes.

    None is observed more exactly than to `tick` seconds.
    """

    keepalive: float = 300
    header: float = 60
    body: float = 60
    send: float = 60

    @property
    def tick(self) -> float:
        """How often a connection looks at the clock."""
        return min(self.keepalive, self.header, self.body, self.send) / 4


class Site(Factory):
    """Makes the channels of one door; `handler` answers their requests.

    `finished` is called with each request and its seconds when its answer has ended: for the access log.
    """

    noisy = False

    def __init__(
        self,
        reactor: Any,
        handler: Handler,
        *,
        timeouts: ServerTimeouts,
        on_request_finished: Callable[[Request, float], None],
        get_tls_context: Callable[[], ServerContext] | None = None,
    ) -> None:
        self.reactor = reactor
        self.handler = handler
        self.timeouts = timeouts
        self.timeout_reaper = TimeoutReaper(reactor, timeouts.tick)
        self.on_request_finished = on_request_finished
        self.draining = False
        self.on_closed: Callable[[], None] = lambda: None
        """Called when a connection that was accepted has ended; as a tunnel, perhaps."""
        self._get_tls_context = get_tls_context
        self._channels: set[HTTPChannel] = set()
        self._drain_waiters: list[Deferred[None]] = []

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _AcceptedConnection(self)

    def accept(self, tcp: Any) -> None:
        """Serve a connection that Twisted accepted."""
        channel = HTTPChannel(self, self.handler, secure=self._get_tls_context is not None)
        if self._get_tls_context is None:
            SocketTransport(self.reactor, tcp).take_over(channel)
        else:
            TLSTransport.server(self.reactor, tcp, self._get_tls_context()).take_over(channel)

    def channel_opened(self, channel: HTTPChannel) -> None:
        self._channels.add(channel)

    def channel_closed(self, channel: HTTPChannel) -> None:
        self._channels.discard(channel)
        if not self._channels:
            waiters, self._drain_waiters = self._drain_waiters, []
            for deferred in waiters:
                deferred.callback(None)

    def drain(self) -> Deferred[None]:
        """Close idle connections and let the others end with their answer; fires when none is left."""
        self.draining = True
        for channel in list(self._channels):
            channel.shutdown()
        done: Deferred[None] = Deferred()
        if self._channels:
            self._drain_waiters.append(done)
        else:
            done.callback(None)
        return done

    def abort(self) -> int:
        """Break off the connections that are left; return how many."""
        channels = list(self._channels)
        for channel in channels:
            channel.abort()
        return len(channels)


class _AcceptedConnection(DetachedProtocol):
    """Takes a new connection from Twisted, hands it to the site, and sees its end, whatever has become of it."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def connectionMade(self) -> None:
        self._site.accept(self.transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._site.on_closed()
