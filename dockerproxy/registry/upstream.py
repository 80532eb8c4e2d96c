"""Upstream registries: what the HTTP API needs of one, and the requests that are forwarded to it."""

from __future__ import annotations

import re
from typing import Any, Protocol
from urllib.parse import quote

from dockerproxy.errors import RegistryError, Unsupported, UpstreamError, UpstreamRefused
from dockerproxy.http.forwarding import ForwardedResponse, forward_response, request_body_producer
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.oci.names import Host, Repository
from dockerproxy.oci.routes import Target
from dockerproxy.registry.backend import PullBackend
from dockerproxy.registry.responses import cache_status_fields, upstream_fields, without_cookies

# Request fields that are not forwarded: the login is handled elsewhere, and the framing of the body is our own.
_NOT_FORWARDED = ("authorization", "host", "content-length", "expect", "accept-encoding")

SAFE_METHODS = ("GET", "HEAD")

_MAX_ERROR_BODY = 64 * 1024

# RFC 8288, section 3. A link whose target is only a path leads to us.
_LINK = re.compile(r"<(/[^<>]*)>")


class RegistryResponse(ForwardedResponse, Protocol):
    """A response of an upstream server."""

    async def read_all(self, limit: int) -> bytes: ...


class UpstreamRegistry(PullBackend, Protocol):
    """An upstream registry for one client, implemented by the cache."""

    async def forward(
        self, method: str, path: str, name: Repository | None, headers: Headers, body: Any = None
    ) -> RegistryResponse:
        """Send a request upstream and return the response."""

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]:
        """Return the challenge for a client that gets `error`, a 401."""


def check_push(request: Request, allow_push: bool) -> None:
    """Raise `Unsupported` for a request that writes, unless `allow_push` is true."""
    if not allow_push:
        request.closing = request.has_body  # the body is not read
        raise Unsupported("pushing through this proxy is disabled; its administrator can set ALLOW_PUSH=true")


async def forward_request(
    request: Request, upstream: UpstreamRegistry, target: Target | None, namespace: Host | None = None
) -> None:
    """Forward `request` to upstream, streaming its body and the response. Raise `UpstreamRefused` for a 401.

    `target` is the API resource of its path, None if the path is not part of the API. `namespace` is the client's
    `?ns=`, if it sent one.
    """
    request.cache_status = "PASS"
    path = request.path + (f"?{request.query}" if request.query else "")
    headers = request.headers.end_to_end().without(*_NOT_FORWARDED)
    repository = None
    if target is not None:
        repository, headers = target.name or None, without_cookies(headers)
    response = await upstream.forward(request.method, path, repository, headers, request_body_producer(request))
    if response.status == 401:
        raise UpstreamRefused(401, await _read_error_body(response), tuple(response.headers))
    response_headers = response.headers if target is None else without_cookies(response.headers)
    fields = [
        (name, _add_namespace(namespace, value) if name == "link" else value)
        for name, value in upstream_fields(response_headers)
    ]
    await forward_response(request, response, [*fields, *cache_status_fields(request.cache_status)])


async def _read_error_body(response: RegistryResponse) -> bytes:
    """Return the body of a refusal. Return nothing if it is too long or incomplete, because the status is enough."""
    try:
        return await response.read_all(_MAX_ERROR_BODY)
    except UpstreamError:
        return b""


def _add_namespace(namespace: Host | None, link: str) -> str:
    """Return `link` with `ns=namespace` in its targets. Without it, the next page would be that of another registry."""
    if namespace is None:
        return link

    def substitute(match: re.Match[str]) -> str:
        return f"<{match[1]}{'&' if '?' in match[1] else '?'}ns={quote(str(namespace))}>"

    return _LINK.sub(substitute, link)
