"""The interfaces between the HTTP API and a registry.

Every registry can be pulled from: the hosted one, and an upstream one through the cache. Only the hosted registry also
handles lists, pushes and deletions itself. An upstream registry handles them, so they are forwarded (see `upstream`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol

from attrs import frozen

from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.names import Digest, Reference, Repository, Tag
from dockerproxy.oci.paging import NamePage, Page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.referrers import ReferrersIndex, ReferrersQuery
from dockerproxy.oci.uploads import UploadParameters, UploadStatus
from dockerproxy.registry.principal import Principal


class PullBackend(Protocol):
    """A registry as one client sees it. Methods raise `RegistryError` if they cannot or must not serve a request."""

    async def ping(self) -> None:
        """Return if the client may use the registry at all."""

    def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> Awaitable[ManifestResponse]:
        """Return a manifest for the Accept fields `accept`. If `head` is true, the content may be left out."""

    def blob(self, name: Repository, digest: Digest, *, head: bool) -> Awaitable[BlobResponse]:
        """Return a blob. If `head` is true, the content may be left out."""

    async def referrers(self, name: Repository, subject: Digest, query: ReferrersQuery) -> ReferrersIndex:
        """Return the referrers of the manifest `subject`."""


class UploadBody(Protocol):
    """The body of a request, as it arrives."""

    async def read_chunk(self, at_least: int = ...) -> bytes:
        """Return at least that many bytes, fewer at the end, and ``b""`` after it. Raise `ClientDisconnected`."""


@frozen
class UploadChunk:
    """A part of an upload: the body, and what the fields Content-Range and Content-Length say about it."""

    body: UploadBody
    content_range: str | None
    content_length: int | None


class RegistryBackend(PullBackend, Protocol):
    """The hosted registry. Its methods that change something get the `Principal` that asks for it."""

    async def catalog(self, page: Page) -> NamePage:
        """Return a page of the repositories."""

    async def tags(self, name: Repository, page: Page) -> NamePage:
        """Return a page of a repository's tags."""

    async def put_manifest(
        self, principal: Principal, name: Repository, content: bytes, media_type: str, digest: Digest | None,
        tags: Sequence[Tag],
    ) -> PushedManifest:  # fmt: skip
        """Store a manifest that was pushed as `media_type` under `tags`, or under its `digest` if that is not None."""

    async def delete_manifest(self, principal: Principal, name: Repository, reference: Reference) -> None:
        """Delete a tag, or a manifest with its tags."""

    async def delete_blob(self, principal: Principal, name: Repository, digest: Digest) -> None:
        """Remove a blob from the repository."""

    async def start_upload(
        self, principal: Principal, name: Repository, parameters: UploadParameters, body: UploadBody
    ) -> UploadStatus | None:
        """Mount a blob, receive one at once, or begin a session. Return the session, None if the blob is complete."""

    async def upload_status(self, name: Repository, session: str) -> UploadStatus:
        """Return the status of an upload session."""

    async def upload_chunk(
        self, principal: Principal, name: Repository, session: str, chunk: UploadChunk
    ) -> UploadStatus:
        """Append a chunk. Raise `RangeInvalid` if it is not the next one."""

    async def finish_upload(
        self, principal: Principal, name: Repository, session: str, chunk: UploadChunk, digest: Digest
    ) -> None:
        """Append the last chunk and store the blob. Raise `RangeInvalid` if the chunk is not the next one."""

    async def cancel_upload(self, principal: Principal, name: Repository, session: str) -> None:
        """Delete an upload session."""
