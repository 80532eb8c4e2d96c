"""The storage of the hosted registry in a directory: a `registry.hosted_store.HostedStore` over a `HostedTree`.

On a local disk, reading a link or touching a blob takes some microseconds and happens in the reactor's thread. Writes,
and reads of a directory or a large file, happen in other threads. On a file system that may hang, all of it happens in
threads that nothing else needs (`store.disk_access`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from attrs import define, field, frozen
from twisted.application.internet import TimerService
from twisted.internet.task import deferLater
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.concurrency import spawn
from dockerproxy.errors import BlobUploadUnknown, DigestInvalid, ManifestBlobUnknown, ManifestInvalid, ManifestNeeded
from dockerproxy.oci.content import Content, RemovedImages, StoredManifest
from dockerproxy.oci.manifests import MAX_MANIFEST, media_type_of
from dockerproxy.oci.names import Digest, Reference, Repository, Tag
from dockerproxy.oci.paging import NamePage, Page, take_page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.referrers import ReferrersPage
from dockerproxy.oci.upload_ids import UploadIds, UploadOffer
from dockerproxy.oci.uploads import UploadStatus
from dockerproxy.store.blobs import OpenBlob
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.needs import find_needs
from dockerproxy.store.uploads import Upload, Uploads, unknown_upload
from dockerproxy.thread_pool import ContentParser

_BATCH_SIZE = 100  # references that are checked before the reactor runs again
_MAX_MISSING_LISTED = 10  # missing references that an error message lists
_MAX_REFERRERS_SIZE = 3 * 1024 * 1024  # bytes of descriptors per index: clients read 4 MiB of a manifest

_MAX_REFERRERS_READ = 2000  # per index, also if their type is not the requested one; it takes 50 ms
_INDEXED_AT_ONCE = 20  # manifests that are read while others wait for the repository's lock

_PURGE_INTERVAL = 3600.0  # seconds between two searches for stale upload sessions
_STALE_UPLOAD_AGE = 86400.0  # seconds without a byte after which a session is stale
_MAX_ENDED = 10_000  # uploads that are remembered as ended

log = Logger()


@define(eq=False)
class LocalUpload:
    """An `UploadSession` in the tree. `_upload` is None as long as it has no bytes and no file.

    `_session` is what the client calls it: an offer, or its identifier `_upload_id`.
    """

    _uploads: LocalUploads
    _repository: Repository
    _session: str
    _upload_id: str
    _offer: UploadOffer | None
    _upload: Upload | None = None

    @property
    def status(self) -> UploadStatus:
        if self._upload is None:
            return UploadStatus(self._session, 0)
        return UploadStatus(self._upload.session, self._upload.size)

    async def append(self, data: bytes) -> None:
        await self._uploads.disk.run(self._append, data)

    def _append(self, data: bytes) -> None:
        tree = self._uploads.tree
        tree.check_free_space()
        if self._upload is None:
            assert self._offer is not None
            self._upload = tree.uploads.create(self._upload_id, self._offer.algorithm)
        self._upload.append([data])

    async def truncate(self, size: int) -> None:
        if self._upload is None:
            return
        if size == 0 and self._offer is not None:
            await self._uploads.disk.run(self._upload.cancel)
            self._upload = None
        else:
            await self._uploads.disk.run(self._upload.truncate, size)

    async def commit(self, digest: Digest) -> None:
        await self._uploads.disk.run(self._commit, digest)
        self._uploads.record_end(self._upload_id)

    async def verify(self, digest: Digest) -> Upload | None:
        """Return the verified file, which is open until the session ends; None if the blob is empty.

        Raise `DigestInvalid` if the bytes do not match `digest`.
        """
        await self._uploads.disk.run(self._verify, digest)
        return self._upload

    def _verify(self, digest: Digest) -> None:
        if not (digest == Digest.of(b"", digest.algorithm) if self._upload is None else self._upload.verify(digest)):
            raise DigestInvalid(f"the uploaded bytes do not match {digest}")

    def _commit(self, digest: Digest) -> None:
        tree = self._uploads.tree
        self._verify(digest)
        if self._upload is None:
            tree.blobs.put(b"", digest)
        else:
            self._upload.commit(tree.blobs, digest)
        tree.links.link_layer(self._repository, digest)

    async def suspend(self) -> None:
        if self._upload is not None:
            await self._uploads.disk.run(self._uploads.tree.uploads.suspend, self._upload, quick=True, required=True)

    async def cancel(self) -> None:
        self._uploads.record_end(self._upload_id)
        if self._upload is not None:
            await self._uploads.disk.run(self._upload.cancel, required=True)


@frozen
class LocalUploads:
    """The `UploadSessions` of the tree. `clock` returns POSIX time."""

    disk: DiskAccess
    tree: HostedTree
    _ids: UploadIds
    _clock: Callable[[], float]
    # By identifier. Other processes do not know that these uploads ended, and take their offers for empty sessions.
    _ended: BoundedDict[str, bool] = field(init=False)

    @_ended.default
    def _make_ended(self) -> BoundedDict[str, bool]:
        return BoundedDict(_MAX_ENDED)

    async def start(self, repository: Repository, algorithm: str, owner: str) -> LocalUpload:
        session = self._ids.make_offer(owner, repository, algorithm, self._clock())
        return await self.resume(repository, session)

    async def resume(self, repository: Repository, session: str) -> LocalUpload:
        offer, upload_id = self._read(repository, session)
        try:
            upload = await self.disk.run(self.tree.uploads.resume, upload_id, quick=True)
        except BlobUploadUnknown:
            if offer is None:
                raise
            upload = None
        return LocalUpload(self, repository, session, upload_id, offer, upload)

    async def status(self, repository: Repository, session: str) -> UploadStatus:
        offer, upload_id = self._read(repository, session)
        try:
            return UploadStatus(upload_id, await self.disk.read(self.tree.uploads.size, upload_id))
        except BlobUploadUnknown:
            if offer is None:
                raise
            return UploadStatus(session, 0)

    def record_end(self, upload_id: str) -> None:
        """Remember that an upload has ended, so that its offer is not valid any more."""
        self._ended[upload_id] = True

    def _read(self, repository: Repository, session: str) -> tuple[UploadOffer | None, str]:
        """Return the offer that `session` is, if it is one, and the identifier. Raise `BlobUploadUnknown`."""
        offer = self._ids.read_offer(session, repository, self._clock())
        upload_id = session if offer is None else offer.upload_id
        if upload_id in self._ended or not self._ids.is_of(upload_id, repository):
            raise unknown_upload()
        return offer, upload_id


@frozen
class _FoundManifest:
    """A manifest that the repository has: its content, or an open blob to read it from.

    Neither if the content does not match the digest.
    """

    digest: Digest
    media_type: str | None
    content: bytes | None
    blob: OpenBlob | None


@frozen
class LocalHostedStore:
    """A `HostedStore` over a `HostedTree`.

    Methods that rely on a blob touch it first and look at its link afterwards: gc removes a link only if nobody used
    its blob recently.
    """

    _reactor: Any
    _disk: DiskAccess
    _tree: HostedTree
    _parser: ContentParser
    uploads: LocalUploads

    @classmethod
    def from_tree(
        cls,
        reactor: Any,
        disk: DiskAccess,
        tree: HostedTree,
        parser: ContentParser,
        secret: bytes,
        clock: Callable[[], float],
    ) -> LocalHostedStore:
        """Return the store in `tree`. `secret` signs the identifiers of uploads; `clock` returns POSIX time."""
        return cls(reactor, disk, tree, parser, LocalUploads(disk, tree, UploadIds(secret), clock))

    async def take_over(self) -> None:
        """Do nothing: what is new in a tree is found as it is read."""

    async def has_repository(self, repository: Repository) -> bool:
        return await self._disk.read(self._tree.links.has_repository, repository)

    # blobs

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        return await self._disk.read(self._touch_blob, repository, digest)

    def _touch_blob(self, repository: Repository, digest: Digest) -> int | None:
        size = self._tree.blobs.touch(digest)
        return size if size is not None and self._tree.links.has_layer(repository, digest) else None

    async def open_blob(self, repository: Repository, digest: Digest) -> Content | None:
        return await self._disk.read(self._open_blob, repository, digest)

    def _open_blob(self, repository: Repository, digest: Digest) -> Content | None:
        blob = self._tree.blobs.open(digest)
        if blob is None:
            return None
        if not self._tree.links.has_layer(repository, digest):
            blob.close()
            return None
        return self._disk.open_content(self._tree.blobs, blob)

    async def mount_blob(self, repository: Repository, digest: Digest, source: Repository | None) -> bool:
        links = self._tree.links
        if await self._disk.run(self._tree.blobs.touch, digest, quick=True) is None:
            return False
        if await self._disk.run(links.has_layer, repository, digest, quick=True):
            return True
        if source is not None:
            is_linked = await self._disk.run(links.has_layer, source, digest, quick=True)
        else:
            is_linked = await self._disk.run(self._is_in_any_repository, digest)
        if is_linked:
            await self._disk.run(self._link_layer, repository, digest)
        return is_linked

    def _link_layer(self, repository: Repository, digest: Digest) -> None:
        self._tree.check_free_space()
        self._tree.links.link_layer(repository, digest)

    def _is_in_any_repository(self, digest: Digest) -> bool:
        links = self._tree.links
        return any(links.has_layer(repository, digest) for repository in links.repositories())

    async def unlink_blob(self, repository: Repository, digest: Digest) -> bool:
        return await self._disk.run(self._tree.links.unlink_layer, repository, digest)

    # manifests

    async def manifest(self, repository: Repository, reference: Reference) -> StoredManifest | None:
        found = await self._disk.read(self._find_manifest, repository, reference)
        if found is None:
            return None
        content = found.content
        if found.blob is not None:
            with found.blob:
                content = await self._disk.run(_read_and_verify, found.blob)
        if content is None:
            log.error(
                "the manifest {digest} of {repository} is damaged; push it again, or run `dockerproxy check`",
                digest=str(found.digest),
                repository=repository,
            )
            return None
        media_type = found.media_type
        if media_type is None:
            media_type = await self._parser.parse(_detect_media_type, content)
        return StoredManifest(found.digest, media_type, content)

    def _find_manifest(self, repository: Repository, reference: Reference) -> _FoundManifest | None:
        links = self._tree.links
        digest = reference if isinstance(reference, Digest) else links.tag(repository, reference)
        blob = None if digest is None else self._tree.blobs.open(digest)
        if digest is None or blob is None:
            return None
        if not links.has_manifest(repository, digest):
            blob.close()
            return None
        media_type = links.manifest_media_type(repository, digest)
        content = self._disk.read_at_once(blob) if blob.size <= MAX_MANIFEST else b""
        if content is None:
            return _FoundManifest(digest, media_type, None, blob)
        blob.close()
        return _FoundManifest(digest, media_type, content if _matches(content, digest) else None, None)

    async def commit_manifest(
        self, repository: Repository, manifest: PushedManifest, tags: Sequence[Tag], *, sparse: bool = False
    ) -> None:
        await self._touch_references(repository, manifest, sparse)
        async with self._tree.locks.hold(repository):
            await self._disk.run(self._commit_manifest, repository, manifest, tags)

    def _commit_manifest(self, repository: Repository, manifest: PushedManifest, tags: Sequence[Tag]) -> None:
        self._tree.check_free_space()
        self._tree.blobs.put(manifest.content, manifest.digest)
        self._tree.link_manifest(repository, manifest.digest, manifest.media_type, manifest.referrer, tags)

    async def _touch_references(self, repository: Repository, manifest: PushedManifest, sparse: bool) -> None:
        """Touch all references of `manifest`, so that gc keeps them. Raise `ManifestBlobUnknown` if any is missing."""
        missing: list[str] = []
        references = iter(manifest.required_references())
        while batch := list(islice(references, _BATCH_SIZE)):
            missing += await self._disk.run(self._find_missing, repository, batch, sparse, quick=True)
            if len(batch) == _BATCH_SIZE:
                await deferLater(self._reactor, 0)
        if missing:
            more = f" and {len(missing) - _MAX_MISSING_LISTED} more" if len(missing) > _MAX_MISSING_LISTED else ""
            raise ManifestBlobUnknown(
                f"{repository} lacks references of the manifest: {', '.join(missing[:_MAX_MISSING_LISTED])}{more}"
            )
        if manifest.subject is not None:
            # It may be missing. If it exists, gc keeps it.
            await self._disk.run(self._tree.blobs.touch, manifest.subject, quick=True)

    def _find_missing(self, repository: Repository, batch: list[tuple[Digest, bool]], sparse: bool) -> list[str]:
        missing = []
        for digest, is_manifest in batch:
            is_here = self._tree.blobs.touch(digest) is not None and self._is_linked(repository, digest, is_manifest)
            if not is_here and not (sparse and is_manifest):
                missing.append(str(digest))
        return missing

    def _is_linked(self, repository: Repository, digest: Digest, is_manifest: bool) -> bool:
        # BuildKit's cache is an index of blobs. A child may therefore be a blob too, as in CNCF distribution.
        links = self._tree.links
        return (is_manifest and links.has_manifest(repository, digest)) or links.has_layer(repository, digest)

    async def remove_tag(self, repository: Repository, tag: Tag) -> bool:
        async with self._tree.locks.hold(repository):
            return await self._disk.run(self._tree.links.remove_tag, repository, tag)

    async def remove_manifest(self, repository: Repository, digest: Digest) -> bool:
        async with self._tree.locks.hold(repository):
            return await self._disk.run(self._remove_manifest, repository, digest)

    def _remove_manifest(self, repository: Repository, digest: Digest) -> bool:
        for need in find_needs(self._tree.contents, self._tree.links, repository):
            if need.digest == digest:
                raise ManifestNeeded(
                    f"the index {repository}:{need.tag} needs {digest}; delete that tag first, or run"
                    f" `dockerproxy rm --force {repository}@{digest}`"
                )
        return self._tree.remove_manifest(repository, digest)

    async def remove_images(self, repository: Repository, digest: Digest | None = None) -> RemovedImages:
        async with self._tree.locks.hold(repository):
            return await self._disk.run(self._remove_images, repository, digest)

    def _remove_images(self, repository: Repository, digest: Digest | None) -> RemovedImages:
        tags = manifests = 0
        for tag, target in self._tree.links.iter_tags(repository):
            if digest in (None, target):
                tags += self._tree.links.remove_tag(repository, tag)
        for manifest in self._tree.links.manifests(repository):
            if digest in (None, manifest):
                manifests += self._tree.remove_manifest(repository, manifest)
        return RemovedImages(tags, manifests)

    # lists

    async def tags(self, repository: Repository, page: Page) -> NamePage:
        return await self._disk.run(self._list_tags, repository, page)

    def _list_tags(self, repository: Repository, page: Page) -> NamePage:
        return take_page(self._tree.links.tags_after(repository, page.last), page.limit)

    async def repositories(self, page: Page) -> NamePage:
        return await self._disk.run(self._list_repositories, page)

    def _list_repositories(self, page: Page) -> NamePage:
        # A repository is left out if all its manifests were deleted, although its blobs stay until gc runs.
        links = self._tree.links
        names = (name for name in links.repositories_after(page.last) if next(links.manifests(name), None) is not None)
        return take_page(names, page.limit)

    async def referrers(
        self, repository: Repository, subject: Digest, artifact_type: str | None, after: str | None
    ) -> ReferrersPage:
        if not await self.has_repository(repository):
            return ReferrersPage([])  # and nothing is remembered for a name that anyone can invent
        if not await self._disk.read(self._tree.referrers.is_complete, repository):
            await self._index_referrers(repository)
        return await self._disk.run(self._list_referrers, repository, subject, artifact_type, after)

    async def _index_referrers(self, repository: Repository) -> None:
        """Index the manifests that another registry wrote, a few at a time, so that others can push meanwhile."""
        referrers = self._tree.referrers
        signature = await self._disk.run(referrers.signature, repository, quick=True)
        missing = await self._disk.run(referrers.missing, repository)
        for start in range(0, len(missing), _INDEXED_AT_ONCE):
            async with self._tree.locks.hold(repository):
                batch = missing[start : start + _INDEXED_AT_ONCE]
                await self._disk.run(referrers.index, repository, batch)
        referrers.record_complete(repository, signature)

    def _list_referrers(
        self, repository: Repository, subject: Digest, artifact_type: str | None, after: str | None
    ) -> ReferrersPage:
        descriptors: list[bytes] = []
        size, last = 0, None
        entries = self._tree.referrers.list(repository, subject, after, artifact_type)
        for count, (entry, descriptor) in enumerate(entries, 1):
            if descriptor is not None:
                size += len(descriptor)
                if descriptors and size > _MAX_REFERRERS_SIZE:
                    return ReferrersPage(descriptors, last)
                descriptors.append(descriptor)
            last = entry
            if count == _MAX_REFERRERS_READ:
                return ReferrersPage(descriptors, last)
        return ReferrersPage(descriptors)


def upload_purge_service(reactor: Any, disk: DiskAccess, uploads: Uploads, clock: Callable[[], float]) -> TimerService:
    """Return the service that removes stale upload sessions at start-up and then hourly. `clock` returns POSIX time."""

    async def purge() -> None:
        count = await disk.run(uploads.purge, clock() - _STALE_UPLOAD_AGE)
        if count:
            log.info("removed {count} stale upload sessions", count=count)

    timer = TimerService(_PURGE_INTERVAL, lambda: spawn(purge(), "removing stale upload sessions"))  # type: ignore[no-untyped-call]
    timer.clock = reactor
    return timer


def _read_and_verify(blob: OpenBlob) -> bytes | None:
    content = blob.read_blocking(0, blob.size)
    return content if _matches(content, blob.digest) else None


def _matches(content: bytes, digest: Digest) -> bool:
    return Digest.of(content, digest.algorithm) == digest


def _detect_media_type(content: bytes) -> str:
    """Return the media type of a manifest that another registry stored, from its content."""
    try:
        return media_type_of(content)
    except ManifestInvalid:
        return "application/octet-stream"
