"""Uploads to a bucket: sessions on the disk of this node, whose bytes go to the bucket when they are complete.

Nothing is copied in the store: a blob is sent to its final key. A session that has bytes is known to this node only, so
its status names this node, and the other members of a fleet pass its requests on. One without bytes is an offer, which
every member of the fleet can take up, because the secret that signs it is derived from their CA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from dockerproxy.errors import BlobUploadUnknown
from dockerproxy.oci.names import Digest, Repository
from dockerproxy.oci.upload_ids import UPLOAD_ID
from dockerproxy.oci.uploads import UploadStatus
from dockerproxy.store.local_hosted_store import LocalUpload, LocalUploads

if TYPE_CHECKING:
    from dockerproxy.bucket.manifest_writer import BucketContents


@frozen
class BucketUpload:
    """A `registry.hosted_store.UploadSession` whose bytes are in a file of this node."""

    _local: LocalUpload
    _repository: Repository
    _sessions: BucketUploads

    @property
    def status(self) -> UploadStatus:
        return self._sessions.name_node(self._local.status)

    async def append(self, data: bytes) -> None:
        await self._local.append(data)

    async def truncate(self, size: int) -> None:
        await self._local.truncate(size)

    async def commit(self, digest: Digest) -> None:
        """Return when the store has the blob, and the repository a link to it.

        If the store fails, raise its error; the client may finish the session again.
        """
        file, contents = await self._local.verify(digest), self._sessions.contents
        if file is None:
            await contents.add_bytes(b"", digest)
        else:
            await contents.add_file(file.fileno(), file.size, digest)
        await contents.link_layer(self._repository, digest)
        await self._local.cancel()

    async def suspend(self) -> None:
        await self._local.suspend()

    async def cancel(self) -> None:
        await self._local.cancel()


@frozen
class BucketUploads:
    """The `registry.hosted_store.UploadSessions` that have their bytes at this node.

    `own_name` returns the name of this node in its fleet; it is None if there is no fleet.
    """

    _local: LocalUploads
    contents: BucketContents
    _own_name: Callable[[], str] | None

    async def start(self, repository: Repository, algorithm: str, owner: str) -> BucketUpload:
        return BucketUpload(await self._local.start(repository, algorithm, owner), repository, self)

    async def resume(self, repository: Repository, session: str) -> BucketUpload:
        try:
            return BucketUpload(await self._local.resume(repository, session), repository, self)
        except BlobUploadUnknown as error:
            raise self._explained(error) from None

    async def status(self, repository: Repository, session: str) -> UploadStatus:
        try:
            return self.name_node(await self._local.status(repository, session))
        except BlobUploadUnknown as error:
            raise self._explained(error) from None

    def name_node(self, status: UploadStatus) -> UploadStatus:
        """Return `status` with the name of this node, if the session has bytes."""
        if self._own_name is None or not UPLOAD_ID.fullmatch(status.session):
            return status
        return evolve(status, node=self._own_name())

    def _explained(self, error: BlobUploadUnknown) -> BlobUploadUnknown:
        if self._own_name is not None:
            return error
        return BlobUploadUnknown(
            f"{error.message}; if several nodes share REGISTRY_STORE, set FLEET, or let the balancer send all requests"
            " of a client to the same node"
        )
