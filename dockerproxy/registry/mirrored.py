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
from dockerproxy.oci.contents import BlobAnswer, ManifestAnswer
from dockerproxy.oci.manifests import OCI_INDEX
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.routes import Kind, Target, parse_query
from dockerproxy.registry.answers import API_VERSION, upstream_fields, without_cookies

# What a client says to us and not to upstream: its login is dealt with, the body's framing is ours to say anew.
_NOT_FORWARDED = ("authorization", "host", "content-length", "expect", "accept-encoding")

READING = ("GET", "HEAD")

_MAX_REFUSAL = 64 * 1024

# RFC 8288, section 3; a target that is a path is one of ours.
_LINK = re.compile(r"<(/[^<>]*)>")


class Passed(ForwardedResponse, Protocol):
    """Another server's answer."""

    async def read_all(self, limit: int) -> bytes: ...


class Referrers(Protocol):
    """An index of referrers; `filtered` says whether the artifact type that was asked for is applied."""

    @property
    def content(self) -> bytes: ...

    @property
    def filtered(self) -> bool: ...


class Remote(Protocol):
    """A registry elsewhere for one client: the cache's side of it."""

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestAnswer: ...

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobAnswer: ...

    async def ping(self) -> None: ...

    async def referrers(self, name: Repository, digest: Digest, query: str, artifact_type: str | None) -> Referrers: ...

    async def forward(
        self, method: str, path: str, name: Repository | None, headers: Headers, body: Any = None
    ) -> Passed: ...

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]: ...


@frozen
class Mirrored:
    """A `Source` over a `Remote`. `namespace` is what a client names it by at every request (`?ns=`), if it does."""

    remote: Remote
    allow_push: bool
    namespace: str | None = None

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestAnswer:
        return await self.remote.manifest(name, reference, accept, head=head)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobAnswer:
        return await self.remote.blob(name, digest, head=head)

    async def other(self, request: Request, target: Target) -> None:
        """Answer the ping and referrers ourselves; pass on the rest, and writing only where the settings say so."""
        reading = request.method in READING
        if not reading:
            check_push(request, self.allow_push)
        if reading and target.kind is Kind.BASE:
            await self.remote.ping()
            request.respond(
                200, [("Content-Type", "application/json"), API_VERSION, ("X-Cache", request.cache_status)], b"{}"
            )
        elif reading and target.kind is Kind.REFERRERS:
            await self._referrers(request, target)
        else:
            await pass_on(request, self.remote, target, self.namespace)

    async def _referrers(self, request: Request, target: Target) -> None:
        assert target.name is not None and isinstance(target.reference, Digest)
        artifact_type = next((value for name, value in parse_query(request.query) if name == "artifactType"), None)
        found = await self.remote.referrers(target.name, target.reference, request.query, artifact_type)
        request.cache_status = "PASS"
        fields = [("Content-Type", OCI_INDEX), API_VERSION, ("X-Cache", request.cache_status)]
        if found.filtered:
            fields.append(("OCI-Filters-Applied", "artifactType"))
        request.respond(200, fields, found.content)


def check_push(request: Request, allow_push: bool) -> None:
    """Raise `Unsupported` for a request that writes, where that is not allowed."""
    if not allow_push:
        request.closing = request.has_body  # nobody reads what is being sent
        raise Unsupported("pushing through this proxy is switched off: its administrator can set ALLOW_PUSH=true")


async def pass_on(request: Request, remote: Remote, target: Target | None, namespace: str | None = None) -> None:
    """Answer `request` with what upstream answers to it, body and answer streamed; raise `UpstreamRefused` for a 401.

    `target` is what its path means in the API, None where that is nothing.
    """
    request.cache_status = "PASS"
    path = request.path + (f"?{request.query}" if request.query else "")
    headers = request.headers.end_to_end().without(*_NOT_FORWARDED)
    repository = None
    if target is not None:
        repository, headers = target.name, without_cookies(headers)
    answer = await remote.forward(request.method, path, repository, headers, request_body_producer(request))
    if answer.status == 401:
        raise UpstreamRefused(401, await _words(answer), tuple(answer.headers))
    told = answer.headers if target is None else without_cookies(answer.headers)
    fields = [(name, _within(namespace, value) if name == "link" else value) for name, value in upstream_fields(told)]
    await forward_response(request, answer, [*fields, ("X-Cache", request.cache_status)])


async def _words(answer: Passed) -> bytes:
    """Return the body of a refusal; nothing where it is too long or breaks off, for its status says enough."""
    try:
        return await answer.read_all(_MAX_REFUSAL)
    except UpstreamError:
        return b""


def _within(namespace: str | None, link: str) -> str:
    """Return a Link field that leads on within `namespace`: without it, the next page would be another registry's."""
    if namespace is None:
        return link

    def add(found: re.Match[str]) -> str:
        return f"<{found[1]}{'&' if '?' in found[1] else '?'}ns={quote(namespace)}>"

    return _LINK.sub(add, link)
