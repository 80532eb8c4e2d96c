"""A registry elsewhere, as our clients meet it: pulls from the cache, all else passed on."""

from __future__ import annotations

from typing import Any, Protocol

from attrs import frozen

from dockerproxy.errors import RegistryError, Unsupported
from dockerproxy.http.headers import Headers
from dockerproxy.http.relay import Answer, relay, relayed_fields, request_body
from dockerproxy.http.request import Request
from dockerproxy.oci.contents import BlobAnswer, ManifestAnswer
from dockerproxy.oci.manifests import OCI_INDEX
from dockerproxy.oci.names import Digest, Reference, Repository
from dockerproxy.oci.routes import Kind, Target, parse_query
from dockerproxy.registry.answers import API_VERSION

# What a client says to us and not to upstream: its login is dealt with, the body's framing is ours to say anew.
_NOT_FORWARDED = ("authorization", "host", "content-length", "expect", "accept-encoding")


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
    ) -> Answer: ...

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]: ...


@frozen
class Mirrored:
    """A `Source` over a `Remote`."""

    remote: Remote
    allow_push: bool

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestAnswer:
        return await self.remote.manifest(name, reference, accept, head=head)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobAnswer:
        return await self.remote.blob(name, digest, head=head)

    async def other(self, request: Request, target: Target) -> None:
        """Answer the ping and referrers ourselves; pass on the rest, and writing only where the settings say so."""
        reading = request.method in ("GET", "HEAD")
        if not reading:
            check_push(request, self.allow_push)
        if reading and target.kind is Kind.BASE:
            await self.remote.ping()
            request.answer(
                200, [("Content-Type", "application/json"), API_VERSION, ("X-Cache", request.verdict)], b"{}"
            )
        elif reading and target.kind is Kind.REFERRERS:
            await self._referrers(request, target)
        else:
            await pass_on(request, self.remote, target.name)

    async def _referrers(self, request: Request, target: Target) -> None:
        assert target.name is not None and isinstance(target.reference, Digest)
        artifact_type = next((value for name, value in parse_query(request.query) if name == "artifactType"), None)
        found = await self.remote.referrers(target.name, target.reference, request.query, artifact_type)
        request.verdict = "PASS"
        fields = [("Content-Type", OCI_INDEX), API_VERSION, ("X-Cache", request.verdict)]
        if found.filtered:
            fields.append(("OCI-Filters-Applied", "artifactType"))
        request.answer(200, fields, found.content)


def check_push(request: Request, allow_push: bool) -> None:
    """Raise `Unsupported` for a request that writes, where that is not allowed."""
    if not allow_push:
        request.closing = request.has_body  # nobody reads what is being sent
        raise Unsupported("pushing through this proxy is switched off: its administrator can set ALLOW_PUSH=true")


async def pass_on(request: Request, remote: Remote, name: Repository | None) -> None:
    """Answer `request` with what upstream answers to it, body and answer streamed."""
    request.verdict = "PASS"
    path = request.path + (f"?{request.query}" if request.query else "")
    headers = request.headers.end_to_end().without(*_NOT_FORWARDED)
    answer = await remote.forward(request.method, path, name, headers, request_body(request))
    fields = relayed_fields(answer.headers)
    if answer.status == 401:
        refusal = RegistryError("upstream asks for a login", headers=fields)
        fields = [field for field in fields if field[0] != "www-authenticate"]
        fields += remote.challenge(refusal, secure=request.secure)
    await relay(request, answer, [*fields, ("X-Cache", request.verdict)])
