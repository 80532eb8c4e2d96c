"""The front door: what a client of the proxy port wants, decided by the first line of its request.

CONNECT host:port     a registry's name: intercepted; our own: the hosted registry, answered here as well; any other: a
                      tunnel, if the policy lets it pass
GET http://host/...   a registry's name: answered in its place; our own with this port: see below, with another: the
                      hosted registry; any other: forwarded
GET /...              for ourselves: the page, /ca.crt, the set-up script, and as a mirror /v2/
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol

from attrs import frozen
from twisted.internet.interfaces import IStreamClientEndpoint

from dockerproxy.errors import RegistryError
from dockerproxy.http.channel import Handler, HTTPChannel
from dockerproxy.http.forwarding import ForwardedResponse, forward_response, forwarded_fields, request_body_producer
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import absolute_form, authority_form
from dockerproxy.http.request import Request
from dockerproxy.http.site import Site
from dockerproxy.http.tls import ServerContext, upgrade_to_tls
from dockerproxy.net.dial import Permit
from dockerproxy.oci.names import Host, Registry
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.tunnel import ToEnd, Tunnel, TunnelTimeouts

_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Dial(Protocol):
    """Makes endpoints for hosts; `permit` is asked about every address."""

    def endpoint(self, host: Host, permit: Permit | None = None) -> IStreamClientEndpoint: ...


class Exchange(Protocol):
    """Sends one request to any server."""

    async def request(
        self, method: str, url: str, headers: Headers = ..., body: Any = ..., *, permit: Permit | None = ...
    ) -> ForwardedResponse: ...


class Transfers(Protocol):
    """What is told of long-lived things, so that a stopping daemon waits for them."""

    def add(self, abort: Callable[[], None]) -> Any: ...

    def remove(self, token: Any) -> None: ...


@frozen
class Permitted:
    """Asks the policy about the addresses of one host. Equal to another for the same host: connections are shared."""

    policy: Policy
    host: Host

    def __call__(self, address: str) -> None:
        self.policy.check_address(self.host, address)


@frozen
class Interception:
    """Whom we answer for. `context` returns what TLS as a host needs, `answer` answers a request to a registry."""

    registries: Mapping[Host, Registry]
    context: Callable[[str], ServerContext]
    answer: Callable[[Registry, Request], Awaitable[None]]


@frozen
class FrontDoor:
    """Answers the requests of the proxy port.

    `local` answers those that are for this port itself, `own` those for the registry that is hosted here, under one of
    `own_names`: what its doors would answer, were the client to go there without the proxy.
    """

    clock: Any
    policy: Policy
    interception: Interception
    dial: Dial
    transport: Exchange
    local: Handler
    own: Handler
    own_names: frozenset[str]
    timeouts: TunnelTimeouts
    transfers: Transfers
    log: Callable[[Request, float], None]

    async def handle(self, site: Site, request: Request) -> None:
        """Answer `request`, which came to `site`."""
        try:
            self.policy.check_client(request.client)
            if request.method == "CONNECT":
                await self._connect(site, request)
            elif request.head.target.startswith("/"):
                await self.local(request)
            else:
                await self._forward(request)
        except RegistryError as error:
            if request.started:
                request.abort()
            else:
                answer_plainly(request, error)

    # CONNECT

    async def _connect(self, site: Site, request: Request) -> None:
        request.path = request.query = ""  # before it is parsed: a login may be in it, which is nothing for the log
        host = authority_form(request.head.target)
        request.host = host.authority
        registry = self.interception.registries.get(host)
        if registry is not None:
            self._intercept(site, request, host, partial(self.interception.answer, registry))
            return
        if host.name in self.own_names:
            self._intercept(site, request, host, self.own)
            return
        self.policy.check_port(host)
        self.policy.check_name(host)
        await self._tunnel(request, host)

    def _intercept(self, site: Site, request: Request, host: Host, answer: Handler) -> None:
        context = self.interception.context(host.name)
        transport, received = request.detach()
        transport.write(_ESTABLISHED)
        upgrade_to_tls(transport, context, HTTPChannel(site, answer, secure=True), received)

    async def _tunnel(self, request: Request, host: Host) -> None:
        began = self.clock.seconds()

        def log(size: int) -> None:
            request.bytes_sent = size
            self.transfers.remove(token)
            self.log(request, self.clock.seconds() - began)

        tunnel = Tunnel(self.clock, self.timeouts, log)
        await self.dial.endpoint(host, Permitted(self.policy, host)).connect(ToEnd(tunnel.server))
        request.status, request.cache_status = 200, "PASS"
        transport, received = request.detach()
        token = self.transfers.add(tunnel.abort)
        transport.write(_ESTABLISHED)
        transport.hand_over(tunnel.client)
        if received:
            tunnel.client.dataReceived(received)
        tunnel.open()

    # absolute-form

    async def _forward(self, request: Request) -> None:
        request.path = request.query = ""  # as in `_connect`
        scheme, host, target = absolute_form(request.head.target)
        request.path, _, request.query = target.partition("?")
        request.host = str(host)
        registry = self.interception.registries.get(host)
        if registry is not None:
            await self.interception.answer(registry, request)
        elif host.name in self.own_names:
            await (self.local(request) if host.port == request.port else self.own(request))
        else:
            await self._forward_elsewhere(request, Registry(host, scheme))

    async def _forward_elsewhere(self, request: Request, server: Registry) -> None:
        self.policy.check_http_port(server.host)
        self.policy.check_name(server.host)
        request.cache_status = "PASS"
        url = server.origin + request.path + (f"?{request.query}" if request.query else "")
        headers = request.headers.end_to_end().without("host", "content-length", "expect")
        answer = await self.transport.request(
            request.method, url, headers, request_body_producer(request), permit=Permitted(self.policy, server.host)
        )
        await forward_response(request, answer, forwarded_fields(answer.headers))


def answer_plainly(request: Request, error: RegistryError) -> None:
    """Answer with the sentence of `error`, for a person who reads what curl prints."""
    request.closing = request.closing or request.method == "CONNECT" or request.has_body
    fields = [("Content-Type", "text/plain; charset=utf-8"), *error.headers]
    request.respond(error.status, fields, f"{error.message}\n".encode())
