"""Requests to this server itself: which handler serves a path of a port, and which web pages may send them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping

from attrs import define, field, frozen

from dockerproxy.errors import NameUnknown, Unsupported
from dockerproxy.http.channel import Handler
from dockerproxy.http.cross_origin import CrossOriginProtection, is_preflight, respond_preflight
from dockerproxy.http.message import SAFE_METHODS
from dockerproxy.http.request import ErrorRenderer, Request
from dockerproxy.proxy.host_rule import HostRule, is_host

# A machine needs these before it is set up, and a monitoring system to see that we are alive. They contain no secret,
# and a set-up must not fail because of the name that leads here.
_FOR_ANY_HOST = frozenset({"/ca.crt", "/setup", "/setup/systemd", "/healthz", "/readyz"})

_PUBLIC_PAGES = _FOR_ANY_HOST | {"/"}
_PAGES_TO_LINK_TO = frozenset({"images", "registries", "clients", "doctor", "login", "assets"})
"""The first parts of paths. Pages of others may link to them: browsers send no cookie of a session along with that."""


@define
class BrowserProtection:
    """Protects this server from the pages that browsers show. A newly set `host_rule` applies to later requests."""

    host_rule: HostRule
    cross_origin: CrossOriginProtection

    def check(self, request: Request) -> None:
        """Set `request.host`. Raise `RegistryError` if the request may be one that a web page may not send."""
        host = request.host or request.headers.get("host") or ""
        request.host = host if is_host(host) else ""  # anything else may be a login, which must not be logged
        if not request.secure and request.path not in _FOR_ANY_HOST:
            self.host_rule.check(host)
        self.cross_origin.check(request, public=_is_public(request.path))


def _is_public(path: str) -> bool:
    return path in _PUBLIC_PAGES or path[1:].partition("/")[0] in _PAGES_TO_LINK_TO


@frozen
class Router:
    """The handlers of one port: `registry` for `/v2/` and everything below, and `pages` by path, for GET and HEAD.

    `forms` are the handlers of POST. A path of both that ends in a slash stands for everything below it.
    `render_registry_error` responds with the errors of `/v2/`.
    """

    registry: Handler
    pages: Mapping[str, Handler]
    protection: BrowserProtection
    render_registry_error: ErrorRenderer
    forms: Mapping[str, Handler] = field(factory=dict)

    def handle(self, request: Request) -> Awaitable[None]:
        """Return the awaitable that responds to `request`. Raise `RegistryError`."""
        is_registry = request.path == "/v2" or request.path.startswith("/v2/")
        if is_registry:
            request.error_renderer = self.render_registry_error
        self.protection.check(request)
        if is_preflight(request):
            return respond_preflight(request)
        if is_registry:
            return self.registry(request)
        if request.method == "POST":
            form = _find(self.forms, request.path)
            if form is not None:
                return form(request)
        if request.method not in SAFE_METHODS:
            raise Unsupported(f"{request.path} supports only GET and HEAD", headers=[("Allow", "GET, HEAD")])
        page = _find(self.pages, request.path)
        if page is None:
            raise NameUnknown("no such page; / lists the pages")
        return page(request)


def _find(handlers: Mapping[str, Handler], path: str) -> Handler | None:
    """Return the handler of `path`, or else that of the nearest path above it."""
    handler = handlers.get(path)
    end = len(path)
    while handler is None and (end := path.rfind("/", 1, end)) > 0:
        handler = handlers.get(path[: end + 1])
    return handler
