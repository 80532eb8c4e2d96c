"""Upstream repositories, and the interfaces of the client through which the cache reaches them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Protocol

from attrs import evolve, frozen
from twisted.internet.interfaces import IProtocol

from dockerproxy.cache.identity import PUBLIC
from dockerproxy.errors import (
    CaptivePortalSuspected,
    EndUnconfirmed,
    HeadRefused,
    IntermediaryRefused,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailing,
    UpstreamRefused,
)
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ClientBuffers
from dockerproxy.net.dial import AddressCheck
from dockerproxy.oci.names import Digest, Registry, Repository
from dockerproxy.store.layout import IngestKey
from dockerproxy.upstream.content_coding import Decoder
from dockerproxy.upstream.credentials import Anonymous, Credential
from dockerproxy.upstream.refusals import is_own_refusal, is_page
from dockerproxy.upstream.registry_request import RegistryRequest

_NO_HEADERS = Headers()
_MAX_ERROR_BODY = 64 * 1024
_MAX_DECODED = 64 * 1024 * 1024  # bytes; a list of a million tags is shorter
# draft-ietf-httpapi-ratelimit-headers, versions before and after 08, and Docker Hub's own names.
_RATE_LIMIT_FIELDS = frozenset({"retry-after", "ratelimit", "docker-ratelimit-source"})
_RATE_LIMIT_PREFIXES = ("ratelimit-", "x-ratelimit-")
_ERROR_CODES = {401: "UNAUTHORIZED", 403: "DENIED", 405: "UNSUPPORTED", 416: "RANGE_INVALID"}


@frozen
class UpstreamRepository:
    """A repository upstream, and the credential that is sent with requests."""

    registry: Registry
    name: Repository
    credential: Credential

    @property
    def key(self) -> str:
        """The repository's name in the cache's store. It starts with the registry's host."""
        return f"{self.registry.host}/{self.name}"

    def ingest_key(self, digest: Digest) -> IngestKey:
        """Return the key of the download of `digest`, which all repositories of the registry share."""
        return IngestKey(str(self.registry.host), digest)

    def blob_request(
        self, method: str, digest: object, headers: Headers = _NO_HEADERS, *, follow: bool = True
    ) -> RegistryRequest:
        """Return a request of the blob `digest`."""
        return self._request(method, f"/v2/{self.name}/blobs/{digest}", headers, follow)

    def manifest_request(self, method: str, reference: object, headers: Headers) -> RegistryRequest:
        """Return a request of the manifest `reference`, a digest or tag."""
        return self._request(method, f"/v2/{self.name}/manifests/{reference}", headers, True)

    def _request(self, method: str, path: str, headers: Headers, follow: bool) -> RegistryRequest:
        return RegistryRequest(
            method, self.registry, path,
            name=self.name, credential=self.credential, headers=headers, follow=follow,
        )  # fmt: skip


class Sender(Protocol):
    """A member of the fleet that sends content in upstream's place."""

    def report_failure(self, error: UpstreamError) -> None:
        """Note that a response of the member has failed, so that the next request goes elsewhere."""

    def report_mismatch(self, digest: Digest) -> None:
        """Note that content that the member sent, at least in part, does not match `digest`."""


class UpstreamResponse(Protocol):
    """A response from upstream whose body has not been read yet.

    `sender` is the member of the fleet that has sent it in upstream's place, None if upstream itself has.
    """

    status: int
    headers: Headers
    length: int | None
    sender: Sender | None

    def limit_read_ahead(self, size: int) -> None: ...

    def count_for(self, buffers: ClientBuffers) -> None: ...

    async def read_chunk(self) -> bytes: ...

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]: ...

    async def read_all(self, limit: int, digest: Digest | None = ...) -> bytes: ...

    async def discard(self) -> None: ...

    def abort(self) -> None: ...


class DirectResponse(UpstreamResponse, Protocol):
    """A response of the server itself. Its status may be 101 if the request had Upgrade."""

    def hand_over(self, protocol: IProtocol) -> None: ...


class WrappedResponse(UpstreamResponse):
    """A response that is read through another object. A subclass reads the pieces of `_response` in `read_chunk`."""

    _response: UpstreamResponse
    sender: Sender | None = None

    async def read_pieces(self, at_least: int, timeout: float) -> list[bytes]:
        """Return the next piece in a list; an empty list at the end."""
        piece = await self.read_chunk()
        return [piece] if piece else []

    async def read_all(self, limit: int, digest: Digest | None = None) -> bytes:
        return await self._response.read_all(limit, digest)

    def limit_read_ahead(self, size: int) -> None:
        self._response.limit_read_ahead(size)

    def count_for(self, buffers: ClientBuffers) -> None:
        self._response.count_for(buffers)

    async def discard(self) -> None:
        await self._response.discard()

    def abort(self) -> None:
        self._response.abort()


class DecodedResponse(WrappedResponse):
    """A response that is passed on to a client, without its codings, because the client has not asked for any."""

    def __init__(self, response: UpstreamResponse, registry: Registry, codings: Sequence[str]) -> None:
        self.status, self.headers, self.length = response.status, response.headers.without("content-encoding"), None
        self._response = response
        self._registry = registry
        self._decoder = Decoder(codings)
        self._pieces: Iterator[bytes] = iter(())
        self._size = 0

    async def read_chunk(self) -> bytes:
        """Return the next piece of the content; ``b""`` at the end. Raise `UpstreamError`."""
        try:
            while not (piece := next(self._pieces, b"")):
                try:
                    data = await self._response.read_chunk()
                except EndUnconfirmed:  # the coding tells whether it is complete
                    data = b""
                if not data:
                    if self._size:
                        self._decoder.finish()
                    return b""
                self._pieces = self._decoder.feed(data)
        except ValueError as error:
            raise UpstreamBroken(f"{self._registry}: {error}") from None
        self._size += len(piece)
        if self._size > _MAX_DECODED:
            raise UpstreamBroken(f"{self._registry}: its decoded content exceeds {_MAX_DECODED} bytes")
        return piece


class UpstreamAgent(Protocol):
    """Sends single requests to any server. Does not follow redirects, and adds no authorization to `headers`."""

    async def request(
        self,
        method: str,
        url: str,
        headers: Headers = ...,
        body: Any = ...,
        *,
        address_check: AddressCheck | None = ...,
    ) -> UpstreamResponse: ...


class RegistryClient(Protocol):
    """Sends requests to registries. Handles authorization, redirects and timeouts."""

    async def request(self, request: RegistryRequest) -> UpstreamResponse: ...

    async def send(
        self,
        method: str,
        registry: Registry,
        path: str,
        headers: Headers,
        body: Any = ...,
        *,
        client_connection: Hashable = ...,
    ) -> DirectResponse: ...


def rate_limit_fields(response: UpstreamResponse) -> tuple[tuple[str, str], ...]:
    """Return the fields that tell the sender of the request how many more upstream allows, and when."""
    return tuple(
        field
        for field in response.headers
        if field[0] in _RATE_LIMIT_FIELDS or field[0].startswith(_RATE_LIMIT_PREFIXES)
    )


async def error_from_response(
    registry: Registry, response: UpstreamResponse, not_found_code: str = "NAME_UNKNOWN"
) -> RegistryError:
    """Return the error for a response that is not a success. Read or discard its body.

    `not_found_code` is the error code for a 404 without a body. A response to HEAD never has a body.
    """
    retry_fields = rate_limit_fields(response)
    if response.status == 429:
        await response.discard()
        return UpstreamFailing(f"{registry} limits the rate of pulls", 429, headers=retry_fields)
    if response.status >= 500 or response.status < 400:
        await response.discard()
        return UpstreamFailing(f"{registry} answered {response.status}", headers=retry_fields)
    try:
        content = await response.read_all(_MAX_ERROR_BODY)
    except UpstreamError:
        content = b""  # too long or incomplete; the status is upstream's word all the same
    fields = tuple(response.headers)
    error_class = UpstreamRefused if is_own_refusal(response.status, response.headers, content) else IntermediaryRefused
    if not content:
        code = not_found_code if response.status == 404 else _ERROR_CODES.get(response.status, "UNKNOWN")
        message = f"{registry} answered {response.status}"
        content = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        fields = (*response.headers.without("content-type"), ("content-type", "application/json"))
    return error_class(response.status, content, fields)


def error_for_content(response: UpstreamResponse, message: str) -> UpstreamBroken:
    """Return the error for a success whose content is not what was asked for; `message` says so."""
    if not is_page(response.headers):
        return UpstreamBroken(message)
    return CaptivePortalSuspected(f"{message}; it is a web page, perhaps of a captive portal")


def may_be_guard(error: RegistryError) -> bool:
    """Return whether `error` may be a refusal of access: of something before the registry, which may be its guard, or
    of a registry that has refused HEAD and could not be asked more.

    Earlier grants then count for the public only.
    """
    return isinstance(error, CaptivePortalSuspected | IntermediaryRefused | HeadRefused)


def is_denial(error: RegistryError, identity: str) -> bool:
    """Return whether upstream or its token server denied access to `identity`, as opposed to not having the content.

    The answer of something before the registry is no denial to the public. It is one to a client with a credential,
    because a guard may have checked that. So is a refusal of HEAD, unless it says that there is no such manifest.
    """
    if isinstance(error, HeadRefused) and error.head_status == 404:
        return False
    if may_be_guard(error):
        return identity != PUBLIC
    return isinstance(error, Unauthorized) or (isinstance(error, UpstreamRefused) and error.status in (401, 403))


def is_gone(error: RegistryError) -> bool:
    """Return whether the registry itself says that it has no such manifest or blob in a repository that is there.

    A registry that hides a repository, because it is private now, says that there is no such name.
    """
    if not isinstance(error, UpstreamRefused) or isinstance(error, IntermediaryRefused) or error.status != 404:
        return False
    try:
        codes = {entry["code"] for entry in json.loads(error.content)["errors"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return bool(codes) and codes <= {"MANIFEST_UNKNOWN", "BLOB_UNKNOWN"}


@frozen
class UpstreamPrincipal:
    """A client that requests something from one repository.

    `repository` includes the credential that is used upstream for this client. Grants are recorded under `identity`.
    `fallback_identity` is the identity in the client's local token. It counts only during an outage. `client` is the
    client's address, for its share of what is bounded.
    """

    repository: UpstreamRepository
    identity: str
    fallback_identity: str | None = None
    client: str = ""

    def without_credential(self) -> UpstreamPrincipal:
        """Return the principal of a client without a credential at the same repository."""
        return UpstreamPrincipal(evolve(self.repository, credential=Anonymous()), PUBLIC, client=self.client)
