"""HTTP agent: single requests to any server, over pooled connections, with TLS and time-outs.

The module `client` adds redirects and authorization.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from attrs import frozen
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.web.iweb import IBodyProducer

from dockerproxy.errors import BadRequest, RegistryError, UpstreamTimeout
from dockerproxy.http.headers import Headers
from dockerproxy.net.dial import AddressCheck, Dialer, SingleProtocolFactory
from dockerproxy.oci.names import Host, Registry
from dockerproxy.upstream.body_writer import framing_field
from dockerproxy.upstream.connection import (
    ConnectionDropped,
    OutgoingRequest,
    Response,
    UpstreamConnection,
    UpstreamTimeouts,
    bound_key,
)
from dockerproxy.upstream.connection_auth import request_logs_in
from dockerproxy.upstream.http1 import render_request_head
from dockerproxy.upstream.pool import Pool
from dockerproxy.upstream.silent_servers import SilentServers
from dockerproxy.upstream.tls import ClientContext, ClientHandshake, TLSClientFactory
from dockerproxy.upstream.urls import split_url

__all__ = ["Agent", "ClientContext", "Response", "UpstreamTimeouts"]

_RETRYABLE_METHODS = frozenset({"GET", "HEAD"})
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})  # RFC 9110, section 8.6: they declare even an empty body
# Fields that the agent sets itself: destination and framing.
_REPLACED_FIELDS = ("host", "content-length", "expect")
_NO_HEADERS = Headers()
_SLOW_DROP = 1.0  # seconds
_MAX_EXAMINED = 256 * 1024  # bytes of an answer to `examine`


@frozen
class Examination:
    """The answer of a server to `Agent.examine`, after so many `seconds`.

    `response` is None if there is an `error`. `issuer` is the name of the CA of its certificate, of a rejected one too.
    """

    seconds: float
    issuer: str
    error: RegistryError | None
    response: Response | None = None
    content: bytes = b""


class Agent:
    """Sends requests over connections from `dialer`, and pools idle connections for later requests.

    `default_address_check` returns the check of a host for requests without one of their own. `silent_servers` may be
    shared with other processes.
    """

    def __init__(
        self,
        reactor: Any,
        dialer: Dialer,
        context: ClientContext,
        timeouts: UpstreamTimeouts,
        default_address_check: Callable[[Host], AddressCheck | None] = lambda host: None,
        silent_servers: SilentServers | None = None,
    ) -> None:
        self._reactor = reactor
        self._dialer = dialer
        self._context = context
        self._timeouts = timeouts
        self._default_address_check = default_address_check
        self._pool = Pool(reactor)
        self._silent_servers = silent_servers or SilentServers(reactor, timeouts.probe)
        self._silent_servers.set_on_silent(self._close_idle)
        self._connections: set[UpstreamConnection] = set()
        self._close_waiters: list[Deferred[None]] = []

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = _NO_HEADERS,
        body: IBodyProducer | None = None,
        *,
        address_check: AddressCheck | None = None,
        client: str = "",
        client_connection: Hashable = None,
        reuse: bool = False,
    ) -> Response:
        """Send a request and return the response once its head is received. The caller reads or aborts its body.

        `address_check` checks every address before a connection is made (see `Dialer.endpoint`). Only requests with an
        equal check share connections, so pass an equal object each time. `client_connection` identifies the client's
        connection that the request came on, if there is one: a connection that it logged in is used for it alone.
        `client` is the address of the client that chose the server, if a client did: such a server is no registry, and
        not remembered if it is silent. With `reuse`, a request with a body or an effect may go over an idle connection,
        too, and the caller sends it again after `ConnectionDropped`. If `headers` have Upgrade, the response may have
        the status 101; no other field for a single connection is sent. Raise the dialer's errors, `UpstreamUnreachable`
        (TLS), `UpstreamTimeout`, `UpstreamBroken` and the errors of `body`.
        """
        origin, target = split_url(url)
        if address_check is None:
            address_check = self._default_address_check(origin.host)
        head = _render_head(method, origin, target, headers, body)
        protocols = headers.joined("upgrade")
        request = OutgoingRequest(method, url, head, body, client_connection, request_logs_in(headers), protocols)
        key = (origin, address_check)
        # The server may close an idle connection at this moment. A request must not be lost if it cannot be sent again.
        # On a connection that its client logged in, it is sent all the same, because only that one will do.
        retryable = method in _RETRYABLE_METHODS and body is None
        idle = None if client_connection is None else self._pool.take(bound_key(key, client_connection))
        if idle is None and (retryable or reuse):
            idle = self._pool.take(key)
        probe = partial(self._probe, key, origin, address_check)

        async def send(connection: UpstreamConnection) -> Response:
            if client or not retryable:
                return await connection.exchange(request)
            return await self._silent_servers.exchange(origin, lambda: connection.exchange(request), probe)

        if idle is not None:
            started = self._reactor.seconds()
            try:
                return await send(idle)
            except ConnectionDropped:
                if not retryable:
                    raise
                if (
                    self._reactor.seconds() - started >= _SLOW_DROP
                ):  # nothing was acknowledged: the others are dead, too
                    self._close_idle(origin.origin)
        connect = partial(self._connect_in_time, key, origin, address_check, client)
        connection = await (connect() if client else self._silent_servers.connect(origin, connect, probe))
        return await send(connection)

    async def examine(self, origin: Registry, limit: float, address_check: AddressCheck | None = None) -> Examination:
        """Return the answer of the server at `origin` to ``GET /v2/`` without a credential, over a new connection.

        It has `limit` seconds for that, or those of the time-outs if they are less. It is asked even if it is known to
        be silent. `address_check` is as for `request`.
        """
        handshake = self._context.handshake(origin.host) if origin.scheme == "https" else None
        started_at, limit = self._reactor.seconds(), min(limit, self._timeouts.probe)
        work = Deferred.fromCoroutine(self._ping(origin, handshake, address_check))
        work.addTimeout(limit, self._reactor)
        error: RegistryError | None = None
        response, content = None, b""
        try:
            response, content = await work
            self._silent_servers.note_answer(origin)
        except TimeoutError:
            error = UpstreamTimeout(f"{origin.host.authority}: no answer within {limit:g} s")
        except RegistryError as failure:
            error = failure
        issuer = "" if handshake is None else handshake.issuer
        return Examination(self._reactor.seconds() - started_at, issuer, error, response, content)

    async def _ping(
        self, origin: Registry, handshake: ClientHandshake | None, address_check: AddressCheck | None
    ) -> tuple[Response, bytes]:
        connection = await self._open_connection(object(), origin, address_check, "", handshake)
        try:
            head = _render_head("GET", origin, "/v2/", _NO_HEADERS, None)
            response = await connection.exchange(OutgoingRequest("GET", f"{origin.origin}/v2/", head))
            return response, await response.read_all(_MAX_EXAMINED)
        finally:
            connection.abort()

    async def close(self) -> None:
        """Abort all connections; return once all are closed."""
        self._silent_servers.close()
        for connection in list(self._connections):
            connection.abort()
        if self._connections:
            closed: Deferred[None] = Deferred()
            self._close_waiters.append(closed)
            await closed

    @property
    def open_connections(self) -> int:
        """The number of connections, including idle ones."""
        return len(self._connections)

    @property
    def idle_connections(self) -> int:
        """The number of connections that no request uses."""
        return len(self._pool)

    def on_connection_idle(self, connection: UpstreamConnection) -> None:
        """Put `connection`, which is idle, into the pool."""
        self._pool.put(connection)

    def on_connection_lost(self, connection: UpstreamConnection) -> None:
        """Remove `connection`, which is no longer ours, from the pool and from the open connections."""
        self._pool.remove(connection)
        self._connections.discard(connection)
        if not self._connections:
            waiters, self._close_waiters = self._close_waiters, []
            for waiter in waiters:
                waiter.callback(None)

    async def _probe(self, key: Hashable, origin: Registry, address_check: AddressCheck | None) -> None:
        """Raise the error of a server that does not answer `GET /v2/` without a credential, with any status."""
        connection = await self._connect_in_time(key, origin, address_check, "")
        head = _render_head("GET", origin, "/v2/", _NO_HEADERS, None)
        response = await connection.exchange(OutgoingRequest("GET", f"{origin.origin}/v2/", head))
        await response.discard()

    def _close_idle(self, origin: str) -> None:
        """Close the idle connections to `origin`, because its server no longer answers on them."""
        self._pool.close_all(Registry.parse(origin).host.authority)

    async def _connect_in_time(
        self, key: Hashable, origin: Registry, address_check: AddressCheck | None, client: str
    ) -> UpstreamConnection:
        handshake = self._context.handshake(origin.host) if origin.scheme == "https" else None
        work = Deferred.fromCoroutine(self._open_connection(key, origin, address_check, client, handshake))
        work.addTimeout(self._timeouts.connect, self._reactor)
        try:
            return await work
        except TimeoutError:
            authority, seconds = origin.host.authority, self._timeouts.connect
            raise UpstreamTimeout(f"{authority}: timed out, not connected after {seconds:g} s") from None

    async def _open_connection(
        self,
        key: Hashable,
        origin: Registry,
        address_check: AddressCheck | None,
        client: str,
        handshake: ClientHandshake | None,
    ) -> UpstreamConnection:
        connection = UpstreamConnection(self._reactor, origin.host.authority, handshake, self._timeouts, self, key)
        factory = SingleProtocolFactory(connection) if handshake is None else TLSClientFactory(handshake, connection)
        await self._dialer.endpoint(origin.host, address_check, client).connect(factory)
        self._connections.add(connection)
        try:
            await connection.ready
        except CancelledError:
            connection.abort()
            raise
        return connection


def _render_head(method: str, origin: Registry, target: str, headers: Headers, body: IBodyProducer | None) -> bytes:
    fields = [("Host", origin.origin.partition("://")[2]), *headers.end_to_end().without(*_REPLACED_FIELDS)]
    if "accept-encoding" not in headers:  # only what is forwarded unread has one; the rest must match its digest
        fields.append(("Accept-Encoding", "identity"))
    if "user-agent" not in headers:
        fields.append(("User-Agent", "docker-registry-proxy"))
    if body is not None:
        fields.append(framing_field(body))
    elif method in _BODY_METHODS:
        fields.append(("Content-Length", "0"))
    if (protocols := headers.joined("upgrade")) is not None:
        fields += [("Connection", "Upgrade"), ("Upgrade", protocols)]
    try:
        return render_request_head(method, target, fields)
    except ValueError as error:
        raise BadRequest(f"the request cannot be sent upstream: {error}") from None
