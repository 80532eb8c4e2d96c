"""A registry elsewhere, as our clients meet it: pulls from the cache, all else passed on."""

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

# What a client says to us and not to upstream: its login is dealt with, the body's framing is ours to say anew.
_NOT_FORWARDED = ("authorization", "host", "content-length", "expect", "accept-encoding")

SAFE_METHODS = ("GET", "HEAD")

_MAX_ERROR_BODY = 64 * 1024

# RFC 8288, section 3; a target that is a path is one of ours.
_LINK = re.compile(r"<(/[^<>]*)>")


class RegistryResponse(ForwardedResponse, Protocol):
    """Another server's answer."""

    async def read_all(self, limit: int) -> bytes: ...


class ReferrersIndex(Protocol):
    """An index of referrers; `filtered` says whether the artifact type that was asked for is applied."""

    @property
    def content(self) -> bytes: ...

    @property
    def filtered(self) -> bool: ...


class UpstreamRegistry(Protocol):
    """A registry elsewhere for one client: the cache's side of it."""

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
    """A `Source` over a `Remote`. `namespace` is what a client names it by at every request (`?ns=`), if it does."""

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
        """Answer the ping and referrers ourselves; pass on the rest, and writing only where the settings say so."""
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
    """Raise `Unsupported` for a request that writes, where that is not allowed."""
    if not allow_push:
        request.closing = request.has_body  # nobody reads what is being sent
        raise Unsupported("pushing through this proxy is switched off: its administrator can set ALLOW_PUSH=true")


async def forward_request(
    request: Request, upstream: UpstreamRegistry, target: Target | None, namespace: str | None = None
) -> None:
    """Answer `request` with what upstream answers to it, body and answer streamed; raise `UpstreamRefused` for a 401.

    `target` is what its path means in the API, None where that is nothing.
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
    """Return the body of a refusal; nothing where it is too long or breaks off, for its status says enough."""
    try:
        return await response.read_all(_MAX_ERROR_BODY)
    except UpstreamError:
        return b""


def _add_namespace(namespace: str | None, link: str) -> str:
    """Return a Link field that leads on within `namespace`: without it, the next page would be another registry's."""
    if namespace is None:
        return link

    def substitute(match: re.Match[str]) -> str:
        return f"<{match[1]}{'&' if '?' in match[1] else '?'}ns={quote(namespace)}>"

    return _LINK.sub(substitute, link)
