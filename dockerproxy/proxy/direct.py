"""The request handler of the listeners of the hosted registry, which do not proxy."""

from __future__ import annotations

from collections.abc import Awaitable

from attrs import field, frozen

from dockerproxy.concurrency import current_client
from dockerproxy.errors import Unsupported
from dockerproxy.http.channel import Handler
from dockerproxy.http.message import absolute_form
from dockerproxy.http.request import Request
from dockerproxy.proxy.policy import Policy
from dockerproxy.proxy.trusted_proxies import TrustedProxies


@frozen
class DirectRequestHandler:
    """Passes requests to `handler` if ALLOW_CLIENTS allows the client, which may come through `trusted_proxies`."""

    policy: Policy
    handler: Handler
    trusted_proxies: TrustedProxies = field(factory=TrustedProxies)

    def handle(self, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Raise `RegistryError`."""
        client = self.trusted_proxies.client_of(request.client, request.headers)
        if client is not None:  # it is checked, counted and logged instead of the reverse proxy
            request.client = client.address
            current_client.set(client.address)  # of this request only, whose handler has a context of its own
            if client.scheme is not None:
                request.secure = client.scheme == "https"
        self.policy.check_client(request.client)
        if request.method == "CONNECT":
            raise Unsupported("this is the registry's port; the proxy listens on another one (PROXY_LISTEN)")
        if not request.head.target.startswith("/"):
            # Only proxies receive absolute-form, but every server must accept it (RFC 9112, section 3.2.2).
            request.path = request.query = ""
            _, host, target = absolute_form(request.head.target)
            request.path, _, request.query = target.partition("?")
            request.host = str(host)
        if client is not None and client.host is not None:
            request.host = client.host
        return self.handler(request)
