"""The server factory of a listener: it accepts connections, tracks them, and drains or aborts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.request import Request
from dockerproxy.http.stream import BufferBudget
from dockerproxy.http.timeouts import TimeoutReaper
from dockerproxy.http.tls import ServerContext, TLSTransport
from dockerproxy.http.transport import DetachedProtocol, SocketTransport
from dockerproxy.shares import client_key

_MIN_IDLE = 1.0  # seconds without a request after which a connection may be closed for others
_MAX_UNREAD = 64 * 1024 * 1024  # bytes of bodies in each direction; half of it for one client


@frozen
class ServerTimeouts:
    """Limits for a client to make progress, in seconds. A timeout may fire up to `tick` seconds late."""

    keepalive: float = 300  # until the next request begins
    header: float = 60  # until a request head is complete
    body: float = 60  # until more of a request body arrives
    send: float = 60  # until the client reads more of a response
    min_rate: float = 500  # bytes per second, averaged over a minute, of a body or a response; 0 if there is no bound

    @property
    def tick(self) -> float:
        """The interval in seconds at which deadlines are checked."""
        return min(self.keepalive, self.header, self.body, self.send) / 4


def _make_budget(name: str) -> BufferBudget:
    return BufferBudget(name, _MAX_UNREAD, _MAX_UNREAD // 2)


@frozen
class SiteBudgets:
    """The memory that bodies of a process take: those of requests, and those of responses that it forwards."""

    requests: BufferBudget = field(factory=partial(_make_budget, "bytes of unread requests"))
    responses: BufferBudget = field(factory=partial(_make_budget, "bytes of forwarded responses that are being sent"))


def _ignore_client(client: str) -> None:
    """Do nothing if a client refuses our certificate."""


class Site(Factory):
    """The factory of HTTP channels of one listener; `handler` responds to their requests.

    `on_request_finished` is called with each finished request and its duration in seconds. It writes the access log.
    `budgets` limit the memory that bodies take, of this site and others. `on_certificate_refused` is called with the
    address of each client that did not trust our certificate.
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
        budgets: SiteBudgets | None = None,
        on_certificate_refused: Callable[[str], object] = _ignore_client,
    ) -> None:
        self.reactor = reactor
        self.handler = handler
        self.timeouts = timeouts
        self.timeout_reaper = TimeoutReaper(reactor, timeouts.tick)
        self.on_request_finished = on_request_finished
        self.budgets = budgets or SiteBudgets()
        self.on_certificate_refused = on_certificate_refused
        self.draining = False
        self._get_tls_context = get_tls_context
        self._channels: set[HTTPChannel] = set()
        self._drain_waiters: list[Deferred[None]] = []

    def buildProtocol(self, address: IAddress | None) -> Protocol:
        return self.connection_protocol(_ignore_end)

    def connection_protocol(self, on_closed: Callable[[], None]) -> Protocol:
        """Return the protocol for a connection that Twisted accepted.

        `on_closed` is called when it has closed, even if it was detached and became a tunnel.
        """
        return _AcceptedConnection(self, on_closed)

    @property
    def secure(self) -> bool:
        """Whether its connections begin with TLS."""
        return self._get_tls_context is not None

    def accept(self, tcp: Any) -> None:
        """Serve a connection accepted by Twisted; `tcp` is its transport."""
        channel = HTTPChannel(self, self.handler, secure=self.secure)
        if self._get_tls_context is None:
            SocketTransport(self.reactor, tcp).take_over(channel)
        else:
            TLSTransport.server(self.reactor, tcp, self._get_tls_context()).take_over(channel)

    @property
    def channel_count(self) -> int:
        """The number of HTTP channels, including those within a CONNECT."""
        return len(self._channels)

    def channel_opened(self, channel: HTTPChannel) -> None:
        self._channels.add(channel)

    def channel_closed(self, channel: HTTPChannel) -> None:
        self._channels.discard(channel)
        if not self._channels:
            waiters, self._drain_waiters = self._drain_waiters, []
            for deferred in waiters:
                deferred.callback(None)

    def close_idle(self, client: str) -> None:
        """Close half of the connections of `client` (a `client_key`) without a request: those that are idle longest.

        A connection that has just been opened, or has just had a response, is about to be used.
        """
        latest = self.reactor.seconds() - _MIN_IDLE
        idle = [channel for channel in self._channels if channel.idle and channel.idle_since <= latest]
        idle = sorted((channel for channel in idle if client_key(channel.client) == client), key=_idle_since)
        for channel in idle[: (len(idle) + 1) // 2]:
            channel.shutdown()

    def drain(self) -> Deferred[None]:
        """Close idle connections now and the others after their response; fires when all are closed."""
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
        """Reset all remaining connections and return their number."""
        channels = list(self._channels)
        for channel in channels:
            channel.abort()
        return len(channels)


def _idle_since(channel: HTTPChannel) -> float:
    return channel.idle_since


def _ignore_end() -> None:
    """Do nothing when a connection has closed."""


class _AcceptedConnection(DetachedProtocol):
    """The protocol of a connection accepted by Twisted: it passes the connection to the site and reports its end."""

    def __init__(self, site: Site, on_closed: Callable[[], None]) -> None:
        self._site = site
        self._on_closed = on_closed

    def connectionMade(self) -> None:
        self._site.accept(self.transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._on_closed()
