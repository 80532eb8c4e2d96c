"""The request handler of the listeners of the hosted registry, which do not proxy."""

from __future__ import annotations

from collections.abc import Awaitable

from attrs import frozen

from dockerproxy.errors import Unsupported
from dockerproxy.http.channel import Handler
from dockerproxy.http.message import absolute_form
from dockerproxy.http.request import Request
from dockerproxy.proxy.policy import Policy


@frozen
class DirectRequestHandler:
    """Passes requests to `handler` if ALLOW_CLIENTS allows the client."""

    policy: Policy
    handler: Handler

    def handle(self, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Raise `RegistryError`."""
        self.policy.check_client(request.client)
        if request.method == "CONNECT":
            raise Unsupported("this is the registry's port; the proxy listens on another one (PROXY_LISTEN)")
        if not request.head.target.startswith("/"):
            # Only proxies receive absolute-form, but every server must accept it (RFC 9112, section 3.2.2).
            request.path = request.query = ""
            _, host, target = absolute_form(request.head.target)
            request.path, _, request.query = target.partition("?")
            request.host = str(host)
        return self.handler(request)
