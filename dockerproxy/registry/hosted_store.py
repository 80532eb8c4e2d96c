"""The interface between the hosted registry and its storage.

Every method may wait, for a disk or for another machine. If the storage fails, it raises `OSError`, or a
`RegistryError` that says when to try again. A change is durable when its method returns. gc may run at any time: it
deletes nothing that a method here has just used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dockerproxy.oci.content import Content, RemovedImages, StoredManifest
from dockerproxy.oci.names import Digest, Reference, Repository, Tag
from dockerproxy.oci.paging import NamePage, Page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.referrers import ReferrersPage
from dockerproxy.oci.uploads import UploadStatus


class UploadSession(Protocol):
    """The exclusive right to write to an upload session. It ends with `commit`, `cancel` or `suspend`."""

    @property
    def status(self) -> UploadStatus:
        """The session, and the number of bytes that it has."""

    async def append(self, data: bytes) -> None:
        """Append `data`. If that fails, the session has its old size."""

    async def truncate(self, size: int) -> None:
        """Drop the bytes behind the first `size`."""

    async def commit(self, digest: Digest) -> None:
        """Store the bytes as a blob of the session's repository, and delete the session.

        Raise `DigestInvalid` if they do not match `digest`. If it raises, the session is unchanged.
        """

    async def suspend(self) -> None:
        """Release the session, so that any process can resume it. Does nothing if it has ended."""

    async def cancel(self) -> None:
        """Delete the session and its bytes. A second call does nothing."""


class UploadSessions(Protocol):
    """The upload sessions of all repositories."""

    async def start(self, repository: Repository, algorithm: str, owner: str) -> UploadSession:
        """Start a session whose bytes are hashed with `algorithm` as they arrive.

        Nothing is stored for it before the first byte. Its first `append` raises `TooManyRequests` or
        `ServiceOverloaded` if `owner`, the repository, or all together have too many sessions with bytes.
        """

    async def resume(self, repository: Repository, session: str) -> UploadSession:
        """Open a session to write to it. Raise `BlobUploadUnknown`, or `BlobUploadBusy` if another request does."""

    async def status(self, repository: Repository, session: str) -> UploadStatus:
        """Return the status of a session, even of one that is being written. Raise `BlobUploadUnknown`."""


class HostedStore(Protocol):
    """The storage of the hosted registry."""

    @property
    def uploads(self) -> UploadSessions: ...

    async def take_over(self) -> None:
        """Adapt what another registry has stored, if that is necessary. One process of a daemon calls this."""

    async def has_repository(self, repository: Repository) -> bool:
        """Return whether the repository has, or had, a blob or manifest."""

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """Return the size of a blob in bytes, or None if the repository does not have it."""

    async def open_blob(self, repository: Repository, digest: Digest) -> Content | None:
        """Open a blob, which the caller closes. Return None if the repository does not have it."""

    async def mount_blob(self, repository: Repository, digest: Digest, source: Repository | None) -> bool:
        """Add a blob of the repository `source`, or of any other one if that is None, to `repository`.

        Return False if there is no such blob. A store need not look for one in all repositories.
        """

    async def unlink_blob(self, repository: Repository, digest: Digest) -> bool:
        """Remove a blob from the repository. Return whether it had the blob."""

    async def manifest(self, repository: Repository, reference: Reference) -> StoredManifest | None:
        """Return a manifest whose content matches its digest. Return None if there is none."""

    async def commit_manifest(
        self, repository: Repository, manifest: PushedManifest, tags: Sequence[Tag], *, sparse: bool = False
    ) -> None:
        """Store a manifest in the repository, and point `tags` to it.

        Raise `ManifestBlobUnknown` if the repository lacks a reference of the manifest. With `sparse`, it may lack
        those of an index.
        """

    async def remove_tag(self, repository: Repository, tag: Tag) -> bool:
        """Remove a tag. Return whether it existed."""

    async def remove_manifest(self, repository: Repository, digest: Digest) -> bool:
        """Remove a manifest from the repository, with its tags. Return whether the repository had it.

        Raise `ManifestNeeded` if another manifest, which has a tag, is an index with this one.
        """

    async def remove_images(self, repository: Repository, digest: Digest | None = None) -> RemovedImages:
        """Remove a manifest, or all of the repository, with their tags, even if another manifest needs it."""

    async def tags(self, repository: Repository, page: Page) -> NamePage:
        """Return a page of the repository's tags, in the order of `sort_key`."""

    async def repositories(self, page: Page) -> NamePage:
        """Return a page of the repositories that have manifests, in order of their path components."""

    async def referrers(
        self, repository: Repository, subject: Digest, artifact_type: str | None, after: str | None
    ) -> ReferrersPage:
        """Return the referrers of `subject` behind the entry `after`, as many as one index may have."""
