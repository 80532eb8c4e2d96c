"""Uploads to a bucket: sessions on the disk of this node, whose bytes go to the bucket when they are complete.

Nothing is copied in the store: a blob is sent to its final key. A session that another node began is unknown here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import frozen

from dockerproxy.oci.names import Digest, Repository
from dockerproxy.oci.uploads import UploadStatus
from dockerproxy.store.local_hosted_store import LocalUpload, LocalUploads

if TYPE_CHECKING:
    from dockerproxy.bucket.bucket_hosted_store import BucketContents


@frozen
class BucketUpload:
    """A `registry.hosted_store.UploadSession` whose bytes are in a file of this node."""

    _local: LocalUpload
    _repository: Repository
    _contents: BucketContents

    @property
    def status(self) -> UploadStatus:
        return self._local.status

    async def append(self, data: bytes) -> None:
        await self._local.append(data)

    async def truncate(self, size: int) -> None:
        await self._local.truncate(size)

    async def commit(self, digest: Digest) -> None:
        """Return when the store has the blob, and the repository a link to it.

        If the store fails, raise its error; the client may finish the session again.
        """
        file = await self._local.verify(digest)
        if file is None:
            await self._contents.add_bytes(b"", digest)
        else:
            await self._contents.add_file(file.fileno(), file.size, digest)
        await self._contents.link_layer(self._repository, digest)
        await self._local.cancel()

    async def suspend(self) -> None:
        await self._local.suspend()

    async def cancel(self) -> None:
        await self._local.cancel()


@frozen
class BucketUploads:
    """The `registry.hosted_store.UploadSessions` that began at this node."""

    _local: LocalUploads
    _contents: BucketContents

    async def start(self, repository: Repository, algorithm: str, owner: str) -> BucketUpload:
        return BucketUpload(await self._local.start(repository, algorithm, owner), repository, self._contents)

    async def resume(self, repository: Repository, session: str) -> BucketUpload:
        return BucketUpload(await self._local.resume(repository, session), repository, self._contents)

    async def status(self, repository: Repository, session: str) -> UploadStatus:
        return await self._local.status(repository, session)
