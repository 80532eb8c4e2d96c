"""An upstream registry as a backend of the HTTP API: pulls come from the cache, other requests are forwarded."""

from __future__ import annotations

import re
from typing import Any, Protocol
from urllib.parse import quote

from attrs import frozen

from dockerproxy.errors import RegistryError, Unsupported, UpstreamError, UpstreamRefused
from dockerproxy.http.forwarding import ForwardedResponse, forward_response, request_body_producer
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.manifests import OCI_INDEX
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.routes import Kind, Target, parse_query
from dockerproxy.registry.responses import API_VERSION, cache_status_fields, upstream_fields, without_cookies

# Request fields that are not forwarded: the login is handled elsewhere, and the framing of the body is our own.
_NOT_FORWARDED = ("authorization", "host", "content-length", "expect", "accept-encoding")

SAFE_METHODS = ("GET", "HEAD")

_MAX_ERROR_BODY = 64 * 1024

# RFC 8288, section 3. A link whose target is only a path leads to us.
_LINK = re.compile(r"<(/[^<>]*)>")


class RegistryResponse(ForwardedResponse, Protocol):
    """A response of an upstream server."""

    async def read_all(self, limit: int) -> bytes: ...


class ReferrersIndex(Protocol):
    """An index of referrers. `filtered` is true if it holds only the requested artifact type."""

    @property
    def content(self) -> bytes: ...

    @property
    def filtered(self) -> bool: ...


class UpstreamRegistry(Protocol):
    """An upstream registry for one client, implemented by the cache."""

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse: ...

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse: ...

    async def ping(self) -> None: ...

    async def referrers(
        self, name: Repository, digest: Digest, query: str, artifact_type: str | None
    ) -> ReferrersIndex: ...

    async def forward(
        self, method: str, path: str, name: Repository | None, headers: Headers, body: Any = None
    ) -> RegistryResponse: ...

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]: ...


@frozen
class UpstreamBackend:
    """A `RegistryBackend` over an `UpstreamRegistry`. `namespace` is the client's `?ns=`, if it sends one."""

    upstream: UpstreamRegistry
    allow_push: bool
    namespace: str | None = None

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        return await self.upstream.manifest(name, reference, accept, head=head)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        return await self.upstream.blob(name, digest, head=head)

    async def handle(self, request: Request, target: Target) -> None:
        """Respond to the ping and to referrers. Forward the rest; requests that write need `allow_push`."""
        is_read = request.method in SAFE_METHODS
        if not is_read:
            check_push(request, self.allow_push)
        if is_read and target.kind is Kind.BASE:
            await self.upstream.ping()
            request.respond(200, [("Content-Type", "application/json"), API_VERSION], b"{}")
        elif is_read and target.kind is Kind.REFERRERS:
            await self._referrers(request, target)
        else:
            await forward_request(request, self.upstream, target, self.namespace)

    async def _referrers(self, request: Request, target: Target) -> None:
        assert target.name is not None and isinstance(target.reference, Digest)
        artifact_type = next((value for name, value in parse_query(request.query) if name == "artifactType"), None)
        index = await self.upstream.referrers(target.name, target.reference, request.query, artifact_type)
        request.cache_status = "PASS"
        fields = [("Content-Type", OCI_INDEX), API_VERSION, *cache_status_fields(request.cache_status)]
        if index.filtered:
            fields.append(("OCI-Filters-Applied", "artifactType"))
        request.respond(200, fields, index.content)


def check_push(request: Request, allow_push: bool) -> None:
    """Raise `Unsupported` for a request that writes, unless `allow_push` is true."""
    if not allow_push:
        request.closing = request.has_body  # the body is not read
        raise Unsupported("pushing through this proxy is disabled; its administrator can set ALLOW_PUSH=true")


async def forward_request(
    request: Request, upstream: UpstreamRegistry, target: Target | None, namespace: str | None = None
) -> None:
    """Forward `request` to upstream, streaming its body and the response. Raise `UpstreamRefused` for a 401.

    `target` is the API resource of its path, None if the path is not part of the API.
    """
    request.cache_status = "PASS"
    path = request.path + (f"?{request.query}" if request.query else "")
    headers = request.headers.end_to_end().without(*_NOT_FORWARDED)
    repository = None
    if target is not None:
        repository, headers = target.name, without_cookies(headers)
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


def _add_namespace(namespace: str | None, link: str) -> str:
    """Return `link` with `ns=namespace` in its targets. Without it, the next page would be that of another registry."""
    if namespace is None:
        return link

    def substitute(match: re.Match[str]) -> str:
        return f"<{match[1]}{'&' if '?' in match[1] else '?'}ns={quote(namespace)}>"

    return _LINK.sub(substitute, link)
