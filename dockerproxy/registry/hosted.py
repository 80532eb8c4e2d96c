"""The hosted registry: the rules of distribution-spec 1.1 for pulls, pushes and deletions, over a `HostedStore`.

`AccessControl` has already checked that the client may make the request.

An operation that changes something runs to its end even if the client disconnects. A thread may be writing at that
moment, and the bytes received so far count if the client returns.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from attrs import field, frozen
from twisted.logger import Logger

from dockerproxy.concurrency import shield
from dockerproxy.errors import (
    BlobUnknown,
    BlobUploadInvalid,
    DigestInvalid,
    InsufficientStorage,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    RegistryError,
    StorageFailed,
)
from dockerproxy.http.request import ClientDisconnected
from dockerproxy.oci.content import BlobResponse, ManifestResponse
from dockerproxy.oci.names import Digest, Reference, Repository, Tag
from dockerproxy.oci.paging import NamePage, Page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.referrers import ReferrersIndex, ReferrersQuery, build_index
from dockerproxy.oci.uploads import UploadParameters, UploadStatus, algorithm_for, declared_length
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.backend import UploadBody, UploadChunk
from dockerproxy.registry.hosted_rules import HostedRules
from dockerproxy.registry.hosted_store import HostedStore, UploadSession
from dockerproxy.registry.principal import Principal
from dockerproxy.store.disk_errors import FULL
from dockerproxy.thread_pool import ContentParser

_NO_CACHE_STATUS = "-"  # hosted content does not come from a cache

# Bytes that one call writes and hashes. With chunks of whatever size had arrived, a push over TLS took a fifth more CPU
# time (3.1 s per GB instead of 2.6 s).
_CHUNK_SIZE = 256 * 1024

_MAX_COMPONENTS = 32  # GitLab, which has the deepest names, has groups of twenty levels

T = TypeVar("T")

log = Logger()


@frozen
class HostedRegistry:
    """A `RegistryBackend` over a `HostedStore`."""

    _store: HostedStore
    _parser: ContentParser
    _audit: AuditLog
    _rules: HostedRules = field(factory=HostedRules)

    # pulls

    async def ping(self) -> None:
        """Return: `AccessControl` has decided."""

    async def manifest(
        self, name: Repository, reference: Reference, accept: list[str], *, head: bool
    ) -> ManifestResponse:
        # Accept is ignored, as the spec allows: a tag refers to exactly one manifest.
        manifest = await self._store.manifest(name, reference)
        if manifest is None:
            await self._check_repository(name)
            raise ManifestUnknown(f"{name} has no manifest {reference}")
        content = manifest.content
        return ManifestResponse(manifest.digest, manifest.media_type, len(content), content, _NO_CACHE_STATUS)

    async def blob(self, name: Repository, digest: Digest, *, head: bool) -> BlobResponse:
        if head:
            content, size = None, await self._store.blob_size(name, digest)
        else:
            content = await self._store.open_blob(name, digest)
            size = None if content is None else content.size
        if content is None and size is None:
            await self._check_repository(name)
            raise BlobUnknown(f"{name} has no blob {digest}")
        return BlobResponse(digest, size, content, _NO_CACHE_STATUS)

    async def referrers(self, name: Repository, subject: Digest, query: ReferrersQuery) -> ReferrersIndex:
        # A 404 would tell clients that there is no referrers API, so an unknown repository has an empty index.
        page = await self._store.referrers(name, subject, query.artifact_type, query.last)
        return ReferrersIndex(
            build_index(page.descriptors), query.artifact_type is not None, _NO_CACHE_STATUS, page.last
        )

    # lists

    async def catalog(self, page: Page) -> NamePage:
        return await self._store.repositories(page)

    async def tags(self, name: Repository, page: Page) -> NamePage:
        await self._check_repository(name)
        return await self._store.tags(name, page)

    async def _check_repository(self, name: Repository) -> None:
        if not await self._store.has_repository(name):
            raise NameUnknown(f"there is no repository {name}")

    async def _check_depth(self, name: Repository) -> None:
        """Raise `NameInvalid` if `name` would be a new repository with too many components: each is a directory."""
        components = name.count("/") + 1
        if components > _MAX_COMPONENTS and not await self._store.has_repository(name):
            raise NameInvalid(f"a new repository's name may have {_MAX_COMPONENTS} components, not {components}")

    # manifests and deletions

    async def put_manifest(
        self, principal: Principal, name: Repository, content: bytes, media_type: str, digest: Digest | None,
        tags: Sequence[Tag],
    ) -> PushedManifest:  # fmt: skip
        references = ", ".join(tags) or str(digest)
        operation = self._audited(
            principal, "push", f"{name}:{references}" if tags else f"{name}@{references}",
            self._put_manifest(principal, name, content, media_type, digest, tags),
            lambda manifest: str(manifest.digest),
        )  # fmt: skip
        return await self._finish(principal, f"push to {name}", operation)

    async def _put_manifest(
        self, principal: Principal, name: Repository, content: bytes, media_type: str, digest: Digest | None,
        tags: Sequence[Tag],
    ) -> PushedManifest:  # fmt: skip
        await self._check_depth(name)
        manifest = await self._parser.parse(PushedManifest.parse, content, digest, media_type, client=principal.address)
        sparse = self._rules.allow_sparse_indexes
        await self._store.commit_manifest(name, manifest, tags, sparse=sparse)
        return manifest

    async def delete_manifest(self, principal: Principal, name: Repository, reference: Reference) -> None:
        if isinstance(reference, Digest):
            removal, target = self._store.remove_manifest(name, reference), f"{name}@{reference}"
        else:
            removal, target = self._store.remove_tag(name, reference), f"{name}:{reference}"
        missing = ManifestUnknown(f"{name} has no manifest {reference}")
        await self._delete(principal, target, removal, missing)

    async def delete_blob(self, principal: Principal, name: Repository, digest: Digest) -> None:
        missing = BlobUnknown(f"{name} has no blob {digest}")
        await self._delete(principal, f"{name}@{digest}", self._store.unlink_blob(name, digest), missing)

    async def _delete(
        self, principal: Principal, target: str, removal: Coroutine[Any, Any, bool], missing: RegistryError
    ) -> None:
        """Await `removal`, and raise `missing` if there was nothing to remove."""

        async def delete() -> None:
            if not await removal:
                raise missing

        operation = self._audited(principal, "delete", target, delete(), lambda _: "")
        await self._finish(principal, f"deletion of {target}", operation)

    async def _audited(
        self,
        principal: Principal,
        action: str,
        target: str,
        operation: Coroutine[Any, Any, T],
        describe: Callable[[T], str],
    ) -> T:
        """Return the result of `operation`, and record how it ended; `describe` returns the detail of a result."""
        try:
            result = await operation
        except (OSError, RegistryError) as error:
            self._audit.record(principal, action, target, f"failed: {error}")
            raise
        self._audit.record(principal, action, target, detail=describe(result))
        return result

    # uploads

    async def start_upload(
        self, principal: Principal, name: Repository, parameters: UploadParameters, body: UploadBody
    ) -> UploadStatus | None:
        operation = self._start_upload(principal, name, parameters, body)
        return await self._finish(principal, f"upload to {name}", operation)

    async def _start_upload(
        self, principal: Principal, name: Repository, parameters: UploadParameters, body: UploadBody
    ) -> UploadStatus | None:
        await self._check_depth(name)
        mount, digest = parameters.mount, parameters.digest
        # Without a source, any repository will do, because a client that may push here may read all of them.
        if mount is not None and await self._store.mount_blob(name, mount, parameters.source):
            return None
        algorithm = algorithm_for(digest, parameters.algorithm)
        upload = await self._store.uploads.start(name, algorithm, principal.owner)
        if digest is None:
            status = upload.status
            await upload.suspend()  # before the client continues it, perhaps in another process
            return status
        # The client does not learn the name of this session, so it cannot resume it after a disconnect.
        try:
            await _receive(upload, body, None)
            await _commit(upload, digest)
        finally:
            await upload.cancel()
        return None

    async def upload_status(self, name: Repository, session: str) -> UploadStatus:
        return await self._store.uploads.status(name, session)

    async def upload_chunk(
        self, principal: Principal, name: Repository, session: str, chunk: UploadChunk
    ) -> UploadStatus:
        return await self._finish(principal, f"upload to {name}", self._continue_upload(name, session, chunk, None))

    async def finish_upload(
        self, principal: Principal, name: Repository, session: str, chunk: UploadChunk, digest: Digest
    ) -> None:
        await self._finish(principal, f"upload to {name}", self._continue_upload(name, session, chunk, digest))

    async def _continue_upload(
        self, name: Repository, session: str, chunk: UploadChunk, digest: Digest | None
    ) -> UploadStatus:
        """Append a chunk, and store the blob if `digest` is given."""
        upload = await self._store.uploads.resume(name, session)
        try:
            # Some clients repeat the last chunk's range as they finish without a body; CNCF distribution ignores it.
            is_only_the_end = digest is not None and chunk.content_length == 0
            content_range = None if is_only_the_end else chunk.content_range
            length = declared_length(content_range, chunk.content_length, upload.status.size)
            await _receive(upload, chunk.body, length)
            if digest is not None:
                await _commit(upload, digest)
            return upload.status
        finally:
            await upload.suspend()

    async def cancel_upload(self, principal: Principal, name: Repository, session: str) -> None:
        await self._finish(principal, f"upload to {name}", self._cancel_upload(name, session))

    async def _cancel_upload(self, name: Repository, session: str) -> None:
        upload = await self._store.uploads.resume(name, session)
        await upload.cancel()

    async def _finish(self, principal: Principal, description: str, operation: Coroutine[Any, Any, T]) -> T:
        """Return the result of `operation`, which runs to its end. A failure of the storage becomes a response."""
        expected = (ClientDisconnected, RegistryError)
        return await shield(_report_failure(principal, description, operation), description, expected=expected)


async def _report_failure(principal: Principal, description: str, operation: Coroutine[Any, Any, T]) -> T:
    try:
        return await operation
    except OSError as error:
        log.error(
            "REGISTRY_DIR: {description} by {principal} failed: {reason}",
            description=description,
            principal=str(principal),
            reason=str(error),
        )
        if error.errno in FULL:
            raise InsufficientStorage(f"the registry's disk is full: {error.strerror}") from None
        raise StorageFailed(f"the registry cannot use its disk: {error.strerror}") from None


async def _receive(upload: UploadSession, body: UploadBody, length: int | None) -> None:
    """Append the body. Its length must be `length` bytes unless that is None.

    If the client disconnects, the bytes received so far stay. If the disk is full, the whole session is deleted,
    because the client would start over and have even less space.
    """
    start = upload.status.size
    try:
        while data := await body.read_chunk(_CHUNK_SIZE):
            await upload.append(data)
            del data  # while the client sends nothing, only what `body` buffers takes memory
    except OSError:
        await upload.cancel()
        raise
    received = upload.status.size - start
    if length is not None and received != length:
        await upload.truncate(start)
        raise BlobUploadInvalid(f"the chunk has {received} bytes, but its Content-Range declares {length}")


async def _commit(upload: UploadSession, digest: Digest) -> None:
    """Store the blob. If that fails, the session is deleted, because its client has no way to correct it."""
    try:
        await upload.commit(digest)
    except (OSError, DigestInvalid):
        await upload.cancel()
        raise
