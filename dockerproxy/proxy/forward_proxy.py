"""The forward proxy: dispatches the requests of the proxy port by their request line.

CONNECT host:port     An intercepted registry or the hosted registry: terminate TLS and handle the requests here. An
                      address of this machine with the port of the hosted registry is the hosted registry, too.
                      Any other host: open a tunnel, if the policy allows it.
GET http://host/...   An intercepted registry: handle the request in its place. The hosted registry's name: handle it
                      as `GET /...` if it has this port, else as the hosted registry. An address of this machine with a
                      port of ours: the same. Any other host: forward.
GET /...              This server itself: the start page, /ca.crt, the set-up script, and /v2/ as a mirror.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping
from functools import partial
from typing import Any, Protocol

from attrs import frozen

from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.forwarding import ForwardedResponse, forward_response, forwarded_fields, request_body_producer
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import absolute_form, authority_form
from dockerproxy.http.request import Request
from dockerproxy.http.site import Site
from dockerproxy.http.tls import ServerContext, TLSTransport, start_inner_tls, upgrade_to_tls
from dockerproxy.http.tunnel import Tunnels
from dockerproxy.net.dial import AddressCheck, Dialer, SingleProtocolFactory
from dockerproxy.net.parent_circles import FIELD, ParentCircles
from dockerproxy.oci.names import Host, Registry
from dockerproxy.proxy.login import ProxyLogin
from dockerproxy.proxy.policy import OwnAddressDenied, Policy

_CIRCLES_FIELD = FIELD.lower()
_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class HTTPAgent(Protocol):
    """Sends one request to any server; `dockerproxy.upstream.agent.Agent` is the implementation."""

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = ...,
        body: Any = ...,
        *,
        address_check: AddressCheck | None = ...,
        client: str = ...,
        client_connection: Hashable = ...,
    ) -> ForwardedResponse: ...


@frozen
class DestinationCheck:
    """Checks the addresses of one host against the policy. Checks for the same host are equal, so that requests to it
    share connections."""

    policy: Policy
    host: Host

    def __call__(self, address: str) -> None:
        self.policy.check_address(self.host, address)


@frozen
class Interception:
    """The intercepted registries. `context_for` returns the TLS context for a host, `handle` handles a request."""

    registries: Mapping[Host, Registry]
    context_for: Callable[[Host], ServerContext]
    handle: Callable[[Registry, Request], Awaitable[None]]


@frozen
class InnerHost:
    """A host that only this server answers for, with its TLS context. No other server has its `name`."""

    name: str
    context: Callable[[], ServerContext]
    handle: Handler


@frozen
class ForwardProxy:
    """Handles the requests of the proxy port.

    `local` handles requests for this port itself. `hosted` handles requests for one of `hosted_names`, as the listeners
    of the hosted registry would handle them without the proxy; `hosted_context_for` returns its TLS context for a name
    or address. `registry_ports` are the ports of its listeners with TLS, and `registry_http_ports` those without. A
    client that asks for one of them at an address of this machine is served here, because TUNNEL_DENY forbids
    connections to such addresses. `circles` are given if there are parents. `for_members` is what other members of a
    fleet ask for.
    """

    policy: Policy
    login: ProxyLogin
    interception: Interception
    dialer: Dialer
    agent: HTTPAgent
    circles: ParentCircles | None
    local: Handler
    hosted: Handler
    hosted_names: frozenset[str]
    hosted_context_for: Callable[[str], ServerContext]
    registry_ports: frozenset[int]
    registry_http_ports: frozenset[int]
    tunnels: Tunnels
    for_members: InnerHost | None = None

    def handle(self, site: Site, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`, which `site` received. Raise `RegistryError`."""
        self.policy.check_client(request.client)
        if request.method == "CONNECT":
            return self._handle_connect(site, request)
        if request.head.target.startswith("/"):
            return self.local(request)
        return self._handle_absolute_form(request)

    # CONNECT

    async def _handle_connect(self, site: Site, request: Request) -> None:
        # Before parsing, which may fail: both are logged, and the target may contain a login.
        request.path = request.query = ""
        host = authority_form(request.head.target)
        request.host = host.authority
        await self.login.check(request)
        if self.circles is not None and (value := request.headers.joined(_CIRCLES_FIELD)) is not None:
            self.circles.receive(host, value)
        registry = self.interception.registries.get(host)
        if registry is not None:
            context = self.interception.context_for(host)
            self._intercept(site, request, context, partial(self.interception.handle, registry))
            return
        if host.name in self.hosted_names:
            self._intercept(site, request, self.hosted_context_for(host.name), self.hosted)
            return
        if self.for_members is not None and host.name == self.for_members.name:
            self._intercept(site, request, self.for_members.context(), self.for_members.handle)
            return
        self.policy.check_port(host)
        try:
            self.policy.check_name(host)
            await self._tunnel(request, host)
        except OwnAddressDenied as denied:
            if host.port not in self.registry_ports:
                raise
            # Not for `host`: anyone's name may lead here, and a certificate would make our content that name's.
            self._intercept(site, request, self.hosted_context_for(denied.address), self.hosted)

    def _intercept(self, site: Site, request: Request, context: ServerContext, handler: Handler) -> None:
        handler = partial(self._handle_in_tunnel, request.proxy_user, self.login.guard(handler))
        transport, received = request.detach()
        transport.write(_ESTABLISHED)
        channel = HTTPChannel(site, handler, secure=True)
        if isinstance(transport, TLSTransport):
            transfers = self.tunnels.transfers
            on_closed = partial(transfers.remove, transfers.add(transport.abortConnection))
            start_inner_tls(transport, context, channel, received, on_closed)
        else:
            upgrade_to_tls(transport, context, channel, received)

    def _handle_in_tunnel(self, user: str | None, handler: Handler, request: Request) -> Awaitable[None]:
        """Handle a request in a tunnel that `user` opened, or a client without a login while none was needed."""
        request.proxy_user = user
        if user is None and self.login.users is not None:
            request.closing = True  # so that the client opens another tunnel, with a login
        return handler(request)

    async def _tunnel(self, request: Request, host: Host) -> None:
        request.registry = "other"
        endpoint = self.dialer.endpoint(host, DestinationCheck(self.policy, host), request.client)
        await self.tunnels.open(
            request, 200, _ESTABLISHED, lambda server: endpoint.connect(SingleProtocolFactory(server))
        )

    # absolute-form

    def _handle_absolute_form(self, request: Request) -> Awaitable[None]:
        request.path = request.query = ""  # as in `_handle_connect`
        scheme, host, target = absolute_form(request.head.target)
        request.path, _, request.query = target.partition("?")
        request.host = str(host)
        return self.login.guard(self._dispatch_absolute_form)(request, scheme, host)

    def _dispatch_absolute_form(self, request: Request, scheme: str, host: Host) -> Awaitable[None]:
        registry = self.interception.registries.get(host)
        if registry is not None:
            return self.interception.handle(registry, request)
        if host.name in self.hosted_names:
            return self.local(request) if host.port == request.port else self.hosted(request)
        return self._forward_request(request, Registry(host, scheme))

    async def _forward_request(self, request: Request, server: Registry) -> None:
        request.registry = "other"
        self.policy.check_http_port(server.host)
        url = server.origin + request.path + (f"?{request.query}" if request.query else "")
        headers = request.headers.end_to_end().without("host", "content-length", "expect")
        try:
            self.policy.check_name(server.host)
            response = await self.agent.request(
                request.method,
                url,
                headers,
                request_body_producer(request),
                address_check=DestinationCheck(self.policy, server.host),
                client=request.client,
                client_connection=request.connection_number,
            )
        except OwnAddressDenied:
            if server.host.port == request.port:
                return await self.local(request)
            if server.host.port in self.registry_http_ports:
                return await self.hosted(request)
            raise
        request.cache_status = "PASS"
        request.security_fields = ""  # the other server has its own
        await forward_response(request, response, forwarded_fields(response.headers))
