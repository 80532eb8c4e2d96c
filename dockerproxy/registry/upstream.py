"""Upstream registries: what the HTTP API needs of one, and the requests that are forwarded to it."""

from __future__ import annotations

from collections.abc import Awaitable, Hashable
from typing import Any, Protocol
from urllib.parse import quote

from attrs import frozen

from dockerproxy.errors import RegistryError, Unsupported, UpstreamError, UpstreamRefused
from dockerproxy.http.forwarding import (
    ForwardedResponse,
    SwitchableResponse,
    forward_response,
    request_body_producer,
    switch_protocols,
)
from dockerproxy.http.headers import Headers
from dockerproxy.http.message import SAFE_METHODS, body_framing
from dockerproxy.http.request import Request
from dockerproxy.http.tunnel import Tunnels
from dockerproxy.http.upgrade import requested_protocols
from dockerproxy.oci.names import Host, Registry, Repository
from dockerproxy.oci.paging import next_query
from dockerproxy.oci.routes import LIST_KINDS, Kind, Target, is_api_path
from dockerproxy.registry.backend import PullBackend
from dockerproxy.registry.responses import FieldList, cache_status_fields, page_fields, upstream_fields, x_cache_fields

# Request fields that are not forwarded: the login is handled elsewhere, and the framing of the body is our own.
_NOT_FORWARDED = ("authorization", "host", "content-length", "expect")

# Request fields of a list. Our own login may go along, so nothing else does: no cookie, and no X-HTTP-Method-Override.
_LIST_REQUEST_FIELDS = frozenset({"accept", "if-modified-since", "if-none-match", "user-agent"})

# Request fields of clients at token servers that cannot be a login, beside the Authorization. Some are for tracing.
_TOKEN_REQUEST_FIELDS = frozenset({
    "accept", "accept-language", "cache-control", "content-type", "pragma", "user-agent",
    "baggage", "traceparent", "tracestate",
})  # fmt: skip
_FORM_TYPE = "application/x-www-form-urlencoded"

_MAX_FORM = 64 * 1024
_MAX_ERROR_BODY = 64 * 1024


@frozen
class Namespace:
    """The name by which a client of the mirror names a registry: `?ns=HOST`, or `/v2/HOST/…` if `in_path`."""

    host: Host
    in_path: bool = False

    def url(self, path: str, query: str) -> str:
        """Return the URL by which the client requests `path` and `query` of the registry."""
        if self.in_path:
            return f"/v2/{quote(str(self.host), safe=':')}{path.removeprefix('/v2')}?{query}"
        return f"{path}?{query}&ns={quote(str(self.host))}"


class RegistryResponse(ForwardedResponse, Protocol):
    """A response of an upstream server."""

    async def read_all(self, limit: int) -> bytes: ...


class PageResponse(RegistryResponse, SwitchableResponse, Protocol):
    """The response of an upstream server to a request that is not of the API."""


class UpstreamRegistry(PullBackend, Protocol):
    """An upstream registry for one client, implemented by the cache."""

    async def forward(
        self, method: str, target: Target, path: str, headers: Headers, body: Any = None
    ) -> RegistryResponse:
        """Send a request for the API resource `target`. `path` is its path and query. Return the response."""

    async def forward_page(
        self, method: str, path: str, headers: Headers, body: Any = None, *, client_connection: Hashable = None
    ) -> PageResponse:
        """Send a request that is not of the API as it is, with the client's own login. Return the response.

        If `headers` have Upgrade, the status may be 101.
        """

    async def forward_token_request(
        self,
        registry: Registry,
        method: str,
        path: str,
        headers: Headers,
        form: bytes | None = None,
        *,
        client_connection: Hashable = None,
    ) -> RegistryResponse:
        """Do the same for a request to a page that `registry` names as its token server. `form` is a POST's body."""

    def token_after(self, error: RegistryError, registry: Registry, query: str, form: bytes | None = None) -> bytes:
        """Return a token of ours for a client whose request failed with `error`, if possible, or raise that."""

    def request_login(self, error: RegistryError, name: Repository) -> RegistryError:
        """Return the error for a client whose pull from `name` failed with `error`: a 401 if a login would help."""

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]:
        """Return the challenge for a client that gets `error`, a 401."""


def check_push(request: Request, allow_push: bool) -> None:
    """Raise `Unsupported` for a request that writes, unless `allow_push` is true."""
    if not allow_push:
        request.closing = request.has_body  # the body is not read
        raise Unsupported("pushing through this proxy is disabled; its administrator can set ALLOW_PUSH=true")


def handle_list(
    request: Request,
    target: Target,
    upstream: UpstreamRegistry,
    namespace: Namespace | None = None,
    *,
    asks_for_login: bool = False,
) -> Awaitable[None] | None:
    """Return the awaitable that responds with a list of tags or repositories. Return None for anything else.

    `namespace` is the client's name for the registry, if it is a mirror's. `asks_for_login` says that clients may have
    logins for the registry.
    """
    if target.kind not in LIST_KINDS or request.method not in SAFE_METHODS:
        return None
    return _forward_list(request, upstream, target, namespace, asks_for_login)


async def _forward_list(
    request: Request, upstream: UpstreamRegistry, target: Target, namespace: Namespace | None, asks_for_login: bool
) -> None:
    """Respond with upstream's list of tags or repositories. Raise `UpstreamRefused` for a 401.

    Our own login may have been shown for it, so fields pass by allow lists in both directions. Raise `Unauthorized` if
    a client without a login may get the tags with one.
    """
    request.cache_status = "PASS"
    headers = Headers.from_lowercase([field for field in request.headers if field[0] in _LIST_REQUEST_FIELDS])
    response = await upstream.forward(request.method, target, _path_and_query(request), headers)
    await _refuse_401(response)
    is_without_login = asks_for_login and "authorization" not in request.headers
    if response.status in (403, 404) and target.kind is Kind.TAGS and is_without_login:
        refusal = UpstreamRefused(response.status, await _read_error_body(response), tuple(response.headers))
        raise upstream.request_login(refusal, target.name)
    fields = upstream_fields(response.headers)
    fields += _next_page(request.path, namespace, response.headers.all("link"))
    await forward_response(request, response, [*fields, *cache_status_fields(request.cache_status)])


async def forward_request(request: Request, upstream: UpstreamRegistry, target: Target) -> None:
    """Forward a request for the API resource `target`, such as a push, streaming its body and the response.

    Our own login is never shown for it. Raise `UpstreamRefused` for a 401.
    """
    request.cache_status = "PASS"
    headers = request.headers.end_to_end().without(*_NOT_FORWARDED, "accept-encoding", "cookie")
    path, body = _path_and_query(request), request_body_producer(request)
    response = await upstream.forward(request.method, target, path, headers, body)
    await _refuse_401(response)
    fields = upstream_fields(response.headers)
    fields += [("location", value) for value in response.headers.all("location")]  # of an upload
    await forward_response(request, response, [*fields, *cache_status_fields(request.cache_status)])


def respond_with_token(request: Request, content: bytes) -> None:
    """Respond to a token request with the JSON document `content`."""
    fields = [
        ("Content-Type", "application/json"),
        ("Cache-Control", "no-store"),
        *x_cache_fields(request.cache_status),  # the token may be one of ours
    ]
    request.respond(200, fields, content)


async def forward_token_request(
    request: Request, upstream: UpstreamRegistry, registry: Registry, tunnels: Tunnels
) -> None:
    """Forward a request to a page that `registry` names as its token server.

    The proxy learns from the response if the request is one that a token server reads in one way only.
    """
    headers = request.headers.end_to_end().without(*_NOT_FORWARDED, "accept-encoding")
    length = body_framing(request.head)
    is_form = (headers.get("content-type") or "").partition(";")[0].strip().lower() == _FORM_TYPE
    is_readable = (is_form and length is not None and length <= _MAX_FORM) if request.method == "POST" else length == 0
    if not is_readable or not {name for name, _ in headers} <= _TOKEN_REQUEST_FIELDS:
        return await forward_page(request, upstream, tunnels)
    request.cache_status, request.kind = "PASS", "token"
    form = await request.read_all(_MAX_FORM) if request.method == "POST" else None
    path, connection = _path_and_query(request), request.connection_number
    try:
        response = await upstream.forward_token_request(
            registry, request.method, path, headers, form, client_connection=connection
        )
    except RegistryError as error:
        return respond_with_token(request, upstream.token_after(error, registry, request.query, form))
    await _forward_page_response(request, response)


async def forward_page(request: Request, upstream: UpstreamRegistry, tunnels: Tunnels) -> None:
    """Forward a request that is not of the API: to a web page, a git repository or another API of the same host.

    The client deals with that server by itself, with its own login and cookies, as through a tunnel: only the fields of
    single connections are left out, and no login of ours is ever shown. If both agree on a protocol such as WebSocket,
    a tunnel is what it becomes.
    """
    request.cache_status = "PASS"
    headers, body = request.headers.end_to_end().without(*_NOT_FORWARDED), request_body_producer(request)
    protocols = None if is_api_path(request.path) else requested_protocols(request.head)
    if protocols is not None:
        headers = Headers.from_lowercase([*headers, ("upgrade", protocols)])
    response = await upstream.forward_page(
        request.method, _path_and_query(request), headers, body, client_connection=request.connection_number
    )
    if response.status == 101:
        await switch_protocols(request, response, _page_fields(request, response), tunnels)
    else:
        await _forward_page_response(request, response)


async def _forward_page_response(request: Request, response: RegistryResponse) -> None:
    request.security_fields = ""  # the page has its own
    await forward_response(request, response, _page_fields(request, response))


def _page_fields(request: Request, response: RegistryResponse) -> FieldList:
    return [*page_fields(response.headers), *cache_status_fields(request.cache_status)]


def _path_and_query(request: Request) -> str:
    return request.path + (f"?{request.query}" if request.query else "")


async def _refuse_401(response: RegistryResponse) -> None:
    if response.status == 401:
        raise UpstreamRefused(401, await _read_error_body(response), tuple(response.headers))


async def _read_error_body(response: RegistryResponse) -> bytes:
    """Return the body of a refusal. Return nothing if it is too long or incomplete, because the status is enough."""
    try:
        return await response.read_all(_MAX_ERROR_BODY)
    except UpstreamError:
        return b""


def _next_page(path: str, namespace: Namespace | None, links: list[str]) -> FieldList:
    """Return the Link to the next page of the list at `path`, if one of upstream's `links` is such a link.

    Only its query is upstream's: a link never leads to another list, another host, or out of the namespace.
    """
    query = next_query(links)
    if query is None:
        return []
    url = f"{path}?{query}" if namespace is None else namespace.url(path, query)
    return [("Link", f'<{url}>; rel="next"')]
