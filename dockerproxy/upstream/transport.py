"""Single HTTP exchanges with any server: connections, TLS, time-outs. No redirects, no logins: see `client`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import BadRequest, UpstreamTimeout
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import Dialer, Permit
from dockerproxy.oci.names import Registry
from dockerproxy.upstream.connection import Connection, Dropped, Outgoing, Response, Timeouts
from dockerproxy.upstream.pool import Pool
from dockerproxy.upstream.sending import framing_field
from dockerproxy.upstream.tls import TLSClient, TLSConnector
from dockerproxy.upstream.urls import split_url
from dockerproxy.upstream.wire import render_request

__all__ = ["Response", "TLSClient", "Timeouts", "Transport"]

_REPEATABLE = frozenset({"GET", "HEAD"})
_HAVE_BODIES = frozenset({"POST", "PUT", "PATCH"})  # RFC 9110, section 8.6: an empty one is announced too
# Ours to say: where to, how the body is framed, and that nobody is to recode what a digest is taken of.
_OURS = ("host", "content-length", "expect", "accept-encoding")
_NONE = Headers()


class Transport:
    """Sends requests over connections that `dialer` makes, and keeps these for the next ones."""

    def __init__(self, reactor: Any, dialer: Dialer, tls: TLSClient, timeouts: Timeouts) -> None:
        self._reactor = reactor
        self._dialer = dialer
        self._tls = tls
        self._timeouts = timeouts
        self._pool = Pool(reactor)
        self._open: set[Connection] = set()
        self._closing: list[Deferred[None]] = []

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = _NONE,
        body: IBodyProducer | None = None,
        *,
        permit: Permit | None = None,
    ) -> Response:
        """Return the answer to a request for `url` as soon as its head is here; the caller reads or aborts its body.

        `permit` is asked about every address before a connection goes there (see `Dialer.endpoint`). Connections are
        shared among requests with an equal `permit` only, so pass the same object each time. Raise what the dialer
        raises, `UpstreamUnreachable` (TLS), `UpstreamTimeout`, `UpstreamBroken`, and what `body` fails with.
        """
        origin, target = split_url(url)
        request = Outgoing(method, url, _head(method, origin, target, headers, body), body)
        key = (origin, permit)
        # The server may be closing an idle connection just now, and what cannot be sent twice must not get lost there.
        used = self._pool.take(key) if method in _REPEATABLE and body is None else None
        if used is not None:
            try:
                return await used.exchange(request)
            except Dropped:
                pass
        connection = await self._connect(key, origin, permit)
        return await connection.exchange(request)

    async def close(self) -> None:
        """Close every connection at once; return when none is left."""
        for connection in list(self._open):
            connection.abort()
        if self._open:
            done: Deferred[None] = Deferred()
            self._closing.append(done)
            await done

    def released(self, connection: Connection) -> None:
        """Take note that `connection` is idle."""
        self._pool.put(connection)

    def lost(self, connection: Connection) -> None:
        """Take note that `connection` is no more."""
        self._pool.remove(connection)
        self._open.discard(connection)
        if not self._open:
            closing, self._closing = self._closing, []
            for done in closing:
                done.callback(None)

    async def _connect(self, key: Hashable, origin: Registry, permit: Permit | None) -> Connection:
        work = Deferred.fromCoroutine(self._establish(key, origin, permit))
        work.addTimeout(self._timeouts.connect, self._reactor)
        try:
            return await work
        except TimeoutError:
            place, seconds = origin.host.authority, self._timeouts.connect
            raise UpstreamTimeout(f"{place}: timed out, no connection in {seconds:g} s") from None

    async def _establish(self, key: Hashable, origin: Registry, permit: Permit | None) -> Connection:
        session = self._tls.session(origin.host) if origin.scheme == "https" else None
        connection = Connection(self._reactor, origin.host.authority, session, self._timeouts, self, key)
        factory = _Once(connection) if session is None else TLSConnector(session, connection)
        await self._dialer.endpoint(origin.host, permit).connect(factory)
        self._open.add(connection)
        try:
            await connection.opened
        except CancelledError:
            connection.abort()
            raise
        return connection


def _head(method: str, origin: Registry, target: str, headers: Headers, body: IBodyProducer | None) -> bytes:
    fields = [("Host", origin.origin.partition("://")[2]), *headers.end_to_end().without(*_OURS)]
    fields.append(("Accept-Encoding", "identity"))
    if "user-agent" not in headers:
        fields.append(("User-Agent", "docker-registry-proxy"))
    if body is not None:
        fields.append(framing_field(body))
    elif method in _HAVE_BODIES:
        fields.append(("Content-Length", "0"))
    try:
        return render_request(method, target, fields)
    except ValueError as error:
        raise BadRequest(f"the request cannot be sent upstream: {error}") from None


class _Once(Factory):
    """A factory for the one connection that it was made with."""

    noisy = False

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def buildProtocol(self, address: IAddress | None) -> Connection:
        return self._connection
