"""Content and sources that do what a test tells them."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import frozen
from twisted.internet.defer import Deferred

from dockerproxy.errors import BlobUnknown, ManifestUnknown, RegistryError, UpstreamBroken
from dockerproxy.http.headers import Headers
from dockerproxy.http.request import Request
from dockerproxy.oci.contents import BlobAnswer, ManifestAnswer
from dockerproxy.oci.names import Digest, Reference, Registry, Repository
from dockerproxy.oci.routes import Target


class Text:
    """The content `data`, in pieces of at most `piece` bytes.

    `size` is what is known of its length; `fails` maps offsets to what reading there raises, `waits` those from which
    on reading waits for a Deferred; `bad` is what `settled` raises.
    """

    def __init__(
        self,
        data: bytes,
        *,
        size: int | None = -1,
        piece: int = 1 << 30,
        fails: dict[int, Exception] | None = None,
        waits: dict[int, Deferred[None]] | None = None,
        bad: Exception | None = None,
    ) -> None:
        self.data = data
        self.size = len(data) if size == -1 else size
        self.closed = 0
        self.asked: list[tuple[int, int]] = []
        self._piece = piece
        self._fails = fails or {}
        self._waits = waits or {}
        self._bad = bad

    async def read(self, offset: int, at_most: int) -> bytes | bytearray:
        assert not self.closed
        assert at_most > 0
        self.asked.append((offset, at_most))
        stops = [stop for stop in (*self._fails, *self._waits) if stop > offset]
        if offset in self._waits:
            await self._waits.pop(offset)
        if offset in self._fails:
            raise self._fails[offset]
        stop = min([offset + at_most, offset + self._piece, *stops])
        return bytearray(self.data[offset:stop])

    async def in_file(self, offset: int, at_most: int) -> tuple[int, int] | None:
        return None

    async def settled(self) -> None:
        if self._bad is not None:
            raise self._bad

    def close(self) -> None:
        self.closed += 1


class Shelf:
    """A `Source` with the blobs and manifests that it was given, and whatever `others` do with the rest."""

    def __init__(self) -> None:
        self.blobs: dict[Digest, Text] = {}
        self.manifests: dict[str, ManifestAnswer] = {}
        self.verdict = "HIT"
        self.error: Exception | None = None
        self.asked: list[Any] = []

    def put(self, content: Text) -> Digest:
        digest = Digest.of(content.data)
        self.blobs[digest] = content
        return digest

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestAnswer:
        self.asked.append((name, reference, accept, head))
        if self.error is not None:
            raise self.error
        found = self.manifests.get(str(reference))
        if found is None:
            raise ManifestUnknown("no such manifest")
        return found

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobAnswer:
        self.asked.append((name, digest, head))
        if self.error is not None:
            raise self.error
        content = self.blobs.get(digest)
        if content is None:
            raise BlobUnknown("no such blob")
        return BlobAnswer(digest, content.size, content, self.verdict)

    async def other(self, request: Request, target: Target) -> None:
        self.asked.append((request.method, target))
        request.respond(200, [], b"other")


@pytest.fixture(scope="session")
def text() -> type[Text]:
    """Return `Text`: conftest modules cannot be imported."""
    return Text


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


class Answered:
    """Another server's answer, in memory."""

    def __init__(
        self,
        status: int,
        fields: list[tuple[str, str]],
        body: bytes = b"",
        *,
        length: int | None = -1,
        fails: Exception | None = None,
        piece: int = 1 << 30,
    ) -> None:
        self.status = status
        self.headers = Headers(fields)
        self.length = len(body) if length == -1 else length
        self.aborted = False
        self._rest = body
        self._fails = fails
        self._piece = piece

    async def read_chunk(self) -> bytes:
        if not self._rest and self._fails is not None:
            raise self._fails
        data, self._rest = self._rest[: self._piece], self._rest[self._piece :]
        return data

    async def read_all(self, limit: int) -> bytes:
        if len(self._rest) > limit:
            raise UpstreamBroken("the answer is too long")
        return await self.read_chunk()

    def abort(self) -> None:
        self.aborted = True


@frozen
class Forwarded:
    """A request that was passed on."""

    method: str
    path: str
    name: str | None
    headers: Headers
    body: bytes | None


class Elsewhere(Shelf):
    """A `Remote`: a shelf that answers what is forwarded to it with `answer`, and pings and referrers as told."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[tuple[Registry, str | None]] = []
        self.forwarded: list[Forwarded] = []
        self.answer: Any = Answered(200, [("content-type", "text/plain")], b"from upstream")
        self.pinged: Exception | None = None
        self.referred: Any = None
        self.pieces: list[bytes] = []
        self.realms: dict[tuple[str, str], Registry] = {}
        self.tokens: list[Any] = []

    def open(self, registry: Registry, authorization: str | None) -> Elsewhere:
        """Be the registry for a client; `Open` of doors.py."""
        self.opened.append((registry, authorization))
        return self

    async def ping(self) -> None:
        if self.pinged is not None:
            raise self.pinged

    async def referrers(self, name: Repository, digest: Digest, query: str, artifact_type: str | None) -> Any:
        self.asked.append((name, digest, query, artifact_type))
        if isinstance(self.referred, Exception):
            raise self.referred
        return self.referred

    async def forward(
        self, method: str, path: str, name: Repository | None, headers: Headers, body: Any = None
    ) -> Answered:
        content = None
        if body is not None:
            await body.startProducing(self)
            content = b"".join(self.pieces)
        self.forwarded.append(Forwarded(method, path, name, headers, content))
        if isinstance(self.answer, Exception):
            raise self.answer
        assert isinstance(self.answer, Answered)
        return self.answer

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def challenge(self, error: RegistryError, *, secure: bool) -> list[tuple[str, str]]:
        """Tell the challenges of the error, marked, or one of our own."""
        scheme = "https" if secure else "http"
        told = [value for name, value in error.headers if name.lower() == "www-authenticate"] or ["Bearer remembered"]
        return [("WWW-Authenticate", f'{value},realm="{scheme}://ours/token"') for value in told]

    # Realms

    def served_at(self, host: Registry, path: str) -> Registry | None:
        return self.realms.get((str(host), path))

    async def token(self, registry: Registry, query: str, authorization: str | None, form: bytes | None) -> bytes:
        self.tokens.append((registry, query, authorization, form))
        if self.error is not None:
            raise self.error
        return b'{"token":"t"}'


@pytest.fixture(scope="session")
def answered() -> type[Answered]:
    """Return `Answered`: conftest modules cannot be imported."""
    return Answered


@pytest.fixture
def elsewhere() -> Elsewhere:
    return Elsewhere()
