"""Fake blob contents, backends and upstream registries for the tests of the registry package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from attrs import frozen
from twisted.internet.defer import Deferred

from dockerproxy.errors import (
    BlobUnknown,
    ManifestUnknown,
    RegistryError,
    Unauthorized,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamUnreachable,
)
from dockerproxy.http.headers import Headers
from dockerproxy.http.stream import ClientBuffers
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.manifests import EMPTY_INDEX
from dockerproxy.oci.names import Digest, Reference, Registry, Repository, Tag
from dockerproxy.oci.paging import NamePage, Page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.ranges import ByteRange
from dockerproxy.oci.referrers import ReferrersIndex, ReferrersQuery
from dockerproxy.oci.routes import Target
from dockerproxy.oci.uploads import UploadParameters, UploadStatus
from dockerproxy.registry.backend import UploadBody, UploadChunk
from dockerproxy.registry.principal import Principal


class FakeBlobContent:
    """The blob `data`, read in chunks of at most `chunk_size` bytes.

    `size` is the size that is known. `errors` maps offsets to the errors that a read there raises, `delays` to
    Deferreds that a read there waits for. `wait_verified` raises `verify_error`, if it is set.
    """

    def __init__(
        self,
        data: bytes,
        *,
        size: int | None = -1,
        chunk_size: int = 1 << 30,
        errors: dict[int, Exception] | None = None,
        delays: dict[int, Deferred[None]] | None = None,
        verify_error: Exception | None = None,
    ) -> None:
        self.data = data
        self.size = len(data) if size == -1 else size
        self.close_count = 0
        self.reads: list[tuple[int, int]] = []
        self._chunk_size = chunk_size
        self._errors = errors or {}
        self._delays = delays or {}
        self._verify_error = verify_error

    async def read(self, offset: int, max_bytes: int) -> bytes | bytearray:
        assert not self.close_count
        assert max_bytes > 0
        self.reads.append((offset, max_bytes))
        stops = [stop for stop in (*self._errors, *self._delays) if stop > offset]
        if offset in self._delays:
            await self._delays.pop(offset)
        if offset in self._errors:
            raise self._errors[offset]
        stop = min([offset + max_bytes, offset + self._chunk_size, *stops])
        return bytearray(self.data[offset:stop])

    def expect(self, ranges: Sequence[ByteRange]) -> None:
        pass

    async def sendfile_source(self, offset: int, max_bytes: int) -> tuple[int, int] | None:
        return None

    async def wait_verified(self) -> None:
        if self._verify_error is not None:
            raise self._verify_error

    def close(self) -> None:
        self.close_count += 1


class FakePullBackend:
    """A `PullBackend` with the given blobs and manifests. Pings succeed."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, FakeBlobContent] = {}
        self.manifests: dict[str, ManifestResponse] = {}
        self.cache_status = "HIT"
        self.error: Exception | None = None
        self.calls: list[Any] = []

    def put(self, content: FakeBlobContent) -> Digest:
        digest = Digest.of(content.data)
        self.blobs[digest] = content
        return digest

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        self.calls.append((name, reference, accept, head))
        if self.error is not None:
            raise self.error
        manifest = self.manifests.get(str(reference))
        if manifest is None:
            raise ManifestUnknown("no such manifest")
        return manifest

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        self.calls.append((name, digest, head))
        if self.error is not None:
            raise self.error
        content = self.blobs.get(digest)
        if content is None:
            raise BlobUnknown("no such blob")
        return BlobResponse(digest, content.size, content, self.cache_status)

    async def ping(self) -> None:
        self.calls.append(("ping",))


class FakeRegistryBackend(FakePullBackend):
    """A `RegistryBackend`. Lists have one entry, and every change succeeds. `calls` has the name of each method."""

    async def referrers(self, name: Repository, subject: Digest, query: ReferrersQuery) -> ReferrersIndex:
        self.calls.append(("referrers", name, subject, query))
        return ReferrersIndex(EMPTY_INDEX, False, "-")

    async def catalog(self, page: Page) -> NamePage:
        self.calls.append(("catalog", page))
        return NamePage(["a"], False)

    async def tags(self, name: Repository, page: Page) -> NamePage:
        self.calls.append(("tags", name, page))
        return NamePage(["1"], False)

    async def put_manifest(
        self, principal: Principal, name: Repository, content: bytes, media_type: str, digest: Digest | None,
        tags: Sequence[Tag],
    ) -> PushedManifest:  # fmt: skip
        self.calls.append(("put_manifest", principal, name, digest, tags))
        return PushedManifest(content, Digest.of(content), media_type)

    async def delete_manifest(self, principal: Principal, name: Repository, reference: Reference) -> None:
        self.calls.append(("delete_manifest", principal, name, reference))

    async def delete_blob(self, principal: Principal, name: Repository, digest: Digest) -> None:
        self.calls.append(("delete_blob", principal, name, digest))

    async def start_upload(
        self, principal: Principal, name: Repository, parameters: UploadParameters, body: UploadBody
    ) -> UploadStatus | None:
        self.calls.append(("start_upload", principal, name, parameters))
        return UploadStatus("session", 0)

    async def upload_status(self, name: Repository, session: str) -> UploadStatus:
        self.calls.append(("upload_status", name, session))
        return UploadStatus(session, 3)

    async def upload_chunk(
        self, principal: Principal, name: Repository, session: str, chunk: UploadChunk
    ) -> UploadStatus:
        self.calls.append(("upload_chunk", principal, name, session))
        return UploadStatus(session, 4)

    async def finish_upload(
        self, principal: Principal, name: Repository, session: str, chunk: UploadChunk, digest: Digest
    ) -> None:
        self.calls.append(("finish_upload", principal, name, session, digest))

    async def cancel_upload(self, principal: Principal, name: Repository, session: str) -> None:
        self.calls.append(("cancel_upload", principal, name, session))


@pytest.fixture(scope="session")
def fake_content() -> type[FakeBlobContent]:
    """Return `FakeBlobContent`, because conftest modules cannot be imported."""
    return FakeBlobContent


@pytest.fixture
def backend() -> FakeRegistryBackend:
    return FakeRegistryBackend()


class FakeRegistryResponse:
    """An upstream response in memory."""

    def __init__(
        self,
        status: int,
        fields: list[tuple[str, str]],
        body: bytes = b"",
        *,
        length: int | None = -1,
        error: Exception | None = None,
        chunk_size: int = 1 << 30,
    ) -> None:
        self.status = status
        self.headers = Headers(fields)
        self.length = len(body) if length == -1 else length
        self.aborted = False
        self._remaining = body
        self._error = error
        self._chunk_size = chunk_size

    def count_for(self, buffers: ClientBuffers) -> None: ...

    async def read_chunk(self) -> bytes:
        if not self._remaining and self._error is not None:
            raise self._error
        data, self._remaining = self._remaining[: self._chunk_size], self._remaining[self._chunk_size :]
        return data

    async def read_all(self, limit: int) -> bytes:
        if len(self._remaining) > limit:
            raise UpstreamBroken("the answer is too long")
        return await self.read_chunk()

    def abort(self) -> None:
        self.aborted = True


@frozen
class ForwardedRequest:
    """A request that was forwarded."""

    method: str
    path: str
    name: str | None
    headers: Headers
    body: bytes | None


class FakeUpstreamRegistry(FakePullBackend):
    """An `UpstreamRegistry` and `TokenService` on top of `FakePullBackend`.

    It responds to forwarded requests with `response`, to pings with `ping_error`, and to referrers with
    `referrers_result`. It has content that needs a login if `has_login` is set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open_calls: list[tuple[Registry, str | None]] = []
        self.forwarded_requests: list[ForwardedRequest] = []
        self.response: Any = FakeRegistryResponse(200, [("content-type", "text/plain")], b"from upstream")
        self.ping_error: Exception | None = None
        self.has_login = False
        self.referrers_result: Any = None
        self.body_chunks: list[bytes] = []
        self.realms: dict[tuple[str, str], Registry] = {}
        self.named_pages: dict[tuple[str, str], Registry] = {}
        self.token_calls: list[Any] = []
        self.local_token: bytes | None = None

    def open_registry(self, registry: Registry, authorization: str | None, client: str) -> FakeUpstreamRegistry:
        """Return this registry, as an `OpenRegistry` of intercepted.py."""
        self.open_calls.append((registry, authorization))
        return self

    async def ping(self) -> None:
        if self.ping_error is not None:
            raise self.ping_error

    async def referrers(self, name: Repository, subject: Digest, query: ReferrersQuery) -> ReferrersIndex:
        self.calls.append((name, subject, query.text, query.artifact_type))
        if isinstance(self.referrers_result, Exception):
            raise self.referrers_result
        assert isinstance(self.referrers_result, ReferrersIndex)
        return self.referrers_result

    async def forward(
        self, method: str, target: Target, path: str, headers: Headers, body: Any = None
    ) -> FakeRegistryResponse:
        return await self._respond(method, path, target.name or None, headers, body)

    async def forward_page(
        self, method: str, path: str, headers: Headers, body: Any = None, *, client_connection: object = None
    ) -> FakeRegistryResponse:
        return await self._respond(method, path, None, headers, body)

    async def forward_token_request(
        self,
        registry: Registry,
        method: str,
        path: str,
        headers: Headers,
        form: bytes | None = None,
        *,
        client_connection: object = None,
    ) -> FakeRegistryResponse:
        self.token_calls.append((registry, method, path, form))
        return await self._respond(method, path, None, headers, None)

    def token_after(self, error: RegistryError, registry: Registry, query: str, form: bytes | None = None) -> bytes:
        if self.local_token is None:
            raise error
        return self.local_token

    async def _respond(
        self, method: str, path: str, name: Repository | None, headers: Headers, body: Any
    ) -> FakeRegistryResponse:
        content = None
        if body is not None:
            await body.startProducing(self)
            content = b"".join(self.body_chunks)
        self.forwarded_requests.append(ForwardedRequest(method, path, name, headers, content))
        if isinstance(self.response, Exception):
            raise self.response
        response: FakeRegistryResponse = self.response
        return response

    def write(self, data: bytes) -> None:
        self.body_chunks.append(data)

    def request_login(self, error: RegistryError, name: Repository) -> RegistryError:
        """Return a 401 for `name` in place of an unreachable or refusing upstream, if `has_login` is set."""
        if self.has_login and isinstance(error, UpstreamUnreachable | UpstreamRefused):
            return Unauthorized("log in", headers=[("WWW-Authenticate", f'Bearer scope="{name}"')])
        return error

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]:
        """Return the challenges of `error` with our realm added, or a remembered challenge if it has none."""
        scheme = "https" if secure else "http"
        challenges = [value for name, value in error.headers if name.lower() == "www-authenticate"] or [
            "Bearer remembered"
        ]
        return [("WWW-Authenticate", f'{value},realm="{scheme}://ours/token"') for value in challenges]

    # TokenService

    def registry_for_realm(self, host: Registry, path: str) -> Registry | None:
        return self.realms.get((str(host), path))

    def registry_naming(self, host: Registry, path: str) -> Registry | None:
        return self.named_pages.get((str(host), path))

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        self.token_calls.append((registry, query, authorization, form))
        if self.error is not None:
            raise self.error
        return b'{"token":"t"}'


@pytest.fixture(scope="session")
def fake_response() -> type[FakeRegistryResponse]:
    """Return `FakeRegistryResponse`, because conftest modules cannot be imported."""
    return FakeRegistryResponse


@pytest.fixture
def upstream() -> FakeUpstreamRegistry:
    return FakeUpstreamRegistry()
