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
from dockerproxy.http.patience import Rounds
from dockerproxy.http.request import Request
from dockerproxy.http.tls import ServerContext, TLSTransport
from dockerproxy.http.transport import SocketTransport, Yielded


@frozen
class Timeouts:
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
        timeouts: Timeouts,
        finished: Callable[[Request, float], None],
        tls: Callable[[], ServerContext] | None = None,
    ) -> None:
        self.reactor = reactor
        self.handler = handler
        self.timeouts = timeouts
        self.rounds = Rounds(reactor, timeouts.tick)
        self.log_finished = finished
        self.draining = False
        self.gone: Callable[[], None] = lambda: None
        """Called when a connection that was accepted has ended; as a tunnel, perhaps."""
        self._tls = tls
        self._channels: set[HTTPChannel] = set()
        self._drained: list[Deferred[None]] = []

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return _Acceptor(self)

    def accept(self, tcp: Any) -> None:
        """Serve a connection that Twisted accepted."""
        channel = HTTPChannel(self, self.handler, secure=self._tls is not None)
        if self._tls is None:
            SocketTransport(self.reactor, tcp).start(channel)
        else:
            TLSTransport.server(self.reactor, tcp, self._tls()).start(channel)

    def opened(self, channel: HTTPChannel) -> None:
        self._channels.add(channel)

    def closed(self, channel: HTTPChannel) -> None:
        self._channels.discard(channel)
        if not self._channels:
            waiting, self._drained = self._drained, []
            for deferred in waiting:
                deferred.callback(None)

    def drain(self) -> Deferred[None]:
        """Close idle connections and let the others end with their answer; fires when none is left."""
        self.draining = True
        for channel in list(self._channels):
            channel.retire()
        done: Deferred[None] = Deferred()
        if self._channels:
            self._drained.append(done)
        else:
            done.callback(None)
        return done

    def abort(self) -> int:
        """Break off the connections that are left; return how many."""
        channels = list(self._channels)
        for channel in channels:
            channel.abort()
        return len(channels)


class _Acceptor(Yielded):
    """Takes a new connection from Twisted, hands it to the site, and sees its end, whatever has become of it."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def connectionMade(self) -> None:
        self._site.accept(self.transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._site.gone()
