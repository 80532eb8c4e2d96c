"""Requests to this server itself: which handler serves a path of a port."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping

from attrs import frozen

from dockerproxy.errors import NameUnknown, Unsupported
from dockerproxy.http.channel import Handler
from dockerproxy.http.request import Request


@frozen
class Router:
    """The handlers of one port: `registry` for `/v2/` and everything below, and `pages` by path, for GET and HEAD."""

    registry: Handler
    pages: Mapping[str, Handler]

    def handle(self, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Raise `RegistryError`."""
        request.host = request.host or (request.headers.get("host") or "")
        if request.path == "/v2" or request.path.startswith("/v2/"):
            return self.registry(request)
        if request.method not in ("GET", "HEAD"):
            raise Unsupported(f"{request.path} supports only GET and HEAD", headers=[("Allow", "GET, HEAD")])
        page = self.pages.get(request.path)
        if page is None:
            raise NameUnknown("no such page; / lists the pages")
        return page(request)
