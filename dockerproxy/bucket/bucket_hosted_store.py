"""The storage of the hosted registry in a bucket: a `registry.hosted_store.HostedStore` for any number of nodes.

The bucket has the layout of CNCF distribution's s3 driver (`keys`). Every object is written whole and may be written
again, so nodes need no lock: of two that point a tag to different manifests, the later one wins. A link comes after all
that it leads to. Everything that a client is told to be there, or writes, is kept from garbage collection (`gc_runs`).
While the bucket does not answer, pulls get what this node has in its cache.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from attrs import define, field
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.bucket import keys
from dockerproxy.bucket.bucket_reads import BucketReads
from dockerproxy.bucket.bucket_uploads import BucketUploads
from dockerproxy.bucket.kept_answers import KeptAnswers
from dockerproxy.bucket.manifest_writer import BucketContents, ManifestWriter
from dockerproxy.bucket.s3 import ListedKey, S3Bucket
from dockerproxy.bucket.takeover import take_over
from dockerproxy.concurrency import gather
from dockerproxy.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestInvalid,
    ManifestNeeded,
    StoreUnavailable,
    UpstreamError,
)
from dockerproxy.oci.content import Content, RemovedImages, StoredManifest
from dockerproxy.oci.manifests import (
    INDEX_TYPES,
    KNOWN_TYPES,
    fallback_base,
    fallback_tag,
    media_type_of,
    parse_manifest,
)
from dockerproxy.oci.names import Digest, Reference, Repository, Tag, parse_tag
from dockerproxy.oci.paging import NamePage, Page, sort_key, take_page
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.referrers import Referrer, ReferrersPage, make_referrer
from dockerproxy.store.local_hosted_store import LocalUploads
from dockerproxy.store.referrers import matching_descriptor
from dockerproxy.thread_pool import ContentParser

_AT_ONCE = 16  # requests that one request of a client sends to the store
_MAX_LINK = 256  # bytes of a link, a subject or a media type
_MAX_REFERRERS = 500  # per index, also if their type is not the requested one
_MAX_REFERRERS_SIZE = 3 * 1024 * 1024  # bytes of descriptors per index: clients read 4 MiB of a manifest
_MAX_DESCRIPTOR = 8 * 1024 * 1024
_KNOWN_TTL = 60.0  # seconds for which a repository that was there counts as known
_MAX_KNOWN = 10_000

log = Logger()


@define(eq=False)
class BucketHostedStore:
    """A `HostedStore` in a bucket. `reactor` gives the time for which a repository counts as known."""

    _reactor: Any
    _bucket: S3Bucket
    _reads: BucketReads
    _kept: KeptAnswers
    _parser: ContentParser
    _contents: BucketContents
    _writer: ManifestWriter
    uploads: BucketUploads
    _known: BoundedDict[Repository, bool] = field(init=False)
    _indexed: BoundedDict[Repository, bool] = field(init=False)

    @_known.default
    def _make_known(self) -> BoundedDict[Repository, bool]:
        return BoundedDict(_MAX_KNOWN, ttl=_KNOWN_TTL, clock=self._reactor.seconds)

    @_indexed.default
    def _make_indexed(self) -> BoundedDict[Repository, bool]:
        return BoundedDict(_MAX_KNOWN)

    @classmethod
    def from_parts(
        cls,
        reactor: Any,
        bucket: S3Bucket,
        reads: BucketReads,
        kept: KeptAnswers,
        parser: ContentParser,
        local_uploads: LocalUploads,
        boot_clock: Callable[[], float],
        own_name: Callable[[], str] | None = None,
    ) -> BucketHostedStore:
        """Return the store in `bucket`, with the sessions of `local_uploads`. `own_name` is as for `BucketUploads`."""
        writer = ManifestWriter.of(reactor, bucket, boot_clock)
        uploads = BucketUploads(local_uploads, writer.contents, own_name)
        return cls(reactor, bucket, reads, kept, parser, writer.contents, writer, uploads)

    def start(self) -> None:
        """Watch for garbage collection by any node from now on. Every process of a node calls this."""
        self._writer.view.start()

    async def take_over(self) -> None:
        """Complete the catalog of a bucket that another registry has written. One process of a node calls this."""
        await take_over(self._reactor, self._bucket)

    async def has_repository(self, repository: Repository) -> bool:
        if repository in self._known:
            return True
        for prefix in (keys.layers_prefix(repository), keys.revisions_prefix(repository)):
            if await self._has_keys(prefix):
                self._known[repository] = True
                return True
        return False

    async def _has_keys(self, prefix: str) -> bool:
        async for _ in self._bucket.list_keys(prefix, limit=1):
            return True
        return False

    # blobs

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        try:
            size = await self._contents.size(repository, digest)
        except StoreUnavailable:
            kept = self._kept.blob_size(repository, digest)
            if kept is None or not await self._is_cached(digest):
                raise
            return kept
        await self._kept.keep_blob(repository, digest, size)
        return size

    async def open_blob(self, repository: Repository, digest: Digest) -> Content | None:
        try:
            size = await self._contents.size(repository, digest)
        except StoreUnavailable:
            content = None
            if self._kept.blob_size(repository, digest) is not None:
                content = self._reads.open_cached(digest)
            if content is None:
                raise
            return content
        await self._kept.keep_blob(repository, digest, size)
        if size is None:
            return None
        try:
            return await self._reads.open_blob(repository, digest)
        except BlobUnknown:
            return None
        except UpstreamError as error:
            raise StoreUnavailable(error.message, headers=error.headers) from error

    async def _is_cached(self, digest: Digest) -> bool:
        content = self._reads.open_cached(digest)
        if content is not None:
            content.close()
        return content is not None

    async def mount_blob(self, repository: Repository, digest: Digest, source: Repository | None) -> bool:
        # Without a source, all repositories would have to be asked, so the client uploads the blob.
        if await self._contents.size(repository, digest) is not None:
            return True
        if source is None or await self._contents.size(source, digest) is None:
            return False
        await self._contents.link_layer(repository, digest)
        return True

    async def unlink_blob(self, repository: Repository, digest: Digest) -> bool:
        key = keys.layer_key(repository, digest)
        if await self._bucket.size(key) is None:
            return False
        await self._bucket.delete([key])
        await self._kept.keep_blob(repository, digest, None)
        return True

    # manifests

    async def manifest(self, repository: Repository, reference: Reference) -> StoredManifest | None:
        try:
            return await self._find_manifest(repository, reference)
        except StoreUnavailable:
            kept = await self._find_kept(repository, reference)
            if kept is None:
                raise
            return kept

    async def _find_manifest(self, repository: Repository, reference: Reference) -> StoredManifest | None:
        if isinstance(reference, Digest):
            digest: Digest | None = reference
        else:
            digest = await self._tag(repository, reference)
            await self._kept.keep_tag(repository, reference, digest)
        if digest is None:
            return None
        is_linked, media_type = False, None
        if await self._contents.count_on(repository, digest):
            is_linked, media_type = await self._link_and_type(repository, digest)
        content = await self._reads.read_manifest(digest) if is_linked else None
        if content is None:
            await self._kept.keep_manifest(repository, digest, None)
            return None
        if media_type is None:
            media_type = await self._parser.parse(_detect_media_type, content)
        await self._kept.keep_manifest(repository, digest, media_type)
        return StoredManifest(digest, media_type, content)

    async def _find_kept(self, repository: Repository, reference: Reference) -> StoredManifest | None:
        digest = reference if isinstance(reference, Digest) else self._kept.tag(repository, reference)
        media_type = None if digest is None else self._kept.media_type(repository, digest)
        content = None if digest is None or media_type is None else await self._reads.read_cached_manifest(digest)
        if digest is None or media_type is None or content is None:
            return None
        return StoredManifest(digest, media_type, content)

    async def _link_and_type(self, repository: Repository, digest: Digest) -> tuple[bool, str | None]:
        """Return whether the repository has the manifest, and its media type if we know it."""
        link, content = await gather(
            (
                self._bucket.read_start(key, _MAX_LINK)
                for key in (keys.manifest_key(repository, digest), keys.media_type_key(repository, digest))
            ),
            2,
        )
        return link is not None, _parse_media_type(content)

    async def _tag(self, repository: Repository, tag: str) -> Digest | None:
        content = await self._bucket.read_start(keys.tag_key(repository, tag), _MAX_LINK)
        return None if content is None else _parse_link(content)

    async def commit_manifest(
        self, repository: Repository, manifest: PushedManifest, tags: Sequence[Tag], *, sparse: bool = False
    ) -> None:
        await self._writer.commit(repository, manifest, tags, sparse=sparse)
        await self._reads.keep_manifest(manifest.content, manifest.digest)

    async def remove_tag(self, repository: Repository, tag: Tag) -> bool:
        if await self._bucket.size(keys.tag_key(repository, tag)) is None:
            return False
        await self._delete_tags(repository, [tag], keys.tag_prefix(repository, tag))
        return True

    async def remove_manifest(self, repository: Repository, digest: Digest) -> bool:
        if await self._bucket.size(keys.manifest_key(repository, digest)) is None:
            return False
        targets = await self._tag_targets(repository)
        await self._check_needs(repository, digest, targets)
        return bool((await self._remove_image(repository, digest, targets)).manifests)

    async def remove_images(self, repository: Repository, digest: Digest | None = None) -> RemovedImages:
        if digest is not None:
            return await self._remove_image(repository, digest, await self._tag_targets(repository))
        tags = await self._tag_names(repository)
        await self._delete_tags(repository, tags, keys.tags_prefix(repository))
        manifests = [digest async for digest in self._list_manifests(repository)]
        await self._unlink_manifests(repository, manifests)
        return RemovedImages(len(tags), len(manifests))

    async def _remove_image(
        self, repository: Repository, digest: Digest, targets: dict[Tag, Digest | None]
    ) -> RemovedImages:
        """Remove a manifest, and the tags of `targets` that lead to it."""
        tags = [tag for tag, target in targets.items() if target == digest]
        # The tags first, so that no tag ever points to a missing manifest.
        for tag in tags:
            await self._delete_tags(repository, [tag], keys.tag_prefix(repository, tag))
        derived = [tag for tag in targets if tag not in tags and fallback_base(tag) == fallback_tag(digest)]
        await gather((self._bucket.put(keys.orphaned_key(repository, tag), b"-") for tag in derived), _AT_ONCE)
        is_here = await self._bucket.size(keys.manifest_key(repository, digest)) is not None
        await self._unlink_manifests(repository, [digest] if is_here else [])
        return RemovedImages(len(tags), int(is_here))

    async def _delete_tags(self, repository: Repository, tags: Sequence[Tag], prefix: str) -> None:
        """Delete tags, and all other keys with their common `prefix`."""
        # First what the tags are for others, so that they are gone at once.
        await self._delete([keys.tag_key(repository, tag) for tag in tags])
        await self._delete([entry.key async for entry in self._bucket.list_keys(prefix)])
        for tag in tags:
            await self._kept.keep_tag(repository, tag, None)

    async def _unlink_manifests(self, repository: Repository, digests: Sequence[Digest]) -> None:
        """Remove manifests that have no tag any more."""
        subjects = await gather(
            (self._bucket.read_start(keys.subject_key(repository, digest), _MAX_LINK) for digest in digests), _AT_ONCE
        )
        await self._delete([keys.manifest_key(repository, digest) for digest in digests])
        beside: list[str] = []
        for digest, content in zip(digests, subjects, strict=True):
            beside += [keys.media_type_key(repository, digest), keys.subject_key(repository, digest)]
            subject = _parse_link(content or b"")
            if subject is not None:
                beside.append(keys.referrer_key(repository, subject, digest))
        await self._delete(beside)
        for digest in digests:
            await self._kept.keep_manifest(repository, digest, None)
        await self._leave_catalog(repository)

    async def _delete(self, found: Sequence[str]) -> None:
        if found:
            await self._bucket.delete(found)

    async def _leave_catalog(self, repository: Repository) -> None:
        """Remove a repository without manifests from the catalog."""
        if await self._has_manifests(repository):
            return
        await self._bucket.delete([keys.catalog_key(repository)])
        if await self._has_manifests(repository):  # one was pushed meanwhile
            await self._bucket.put(keys.catalog_key(repository), b"")

    async def _has_manifests(self, repository: Repository) -> bool:
        async for _ in self._list_manifests(repository):
            return True
        return False

    async def _list_manifests(self, repository: Repository) -> AsyncIterator[Digest]:
        async for entry in self._bucket.list_keys(keys.revisions_prefix(repository)):
            revision = keys.revision_of(entry.key)
            if revision is not None and revision[1] == "link":
                yield revision[0]

    async def _tag_names(self, repository: Repository) -> list[Tag]:
        # All keys, because a store may list directories that are empty.
        names = [keys.tag_of(entry.key) async for entry in self._bucket.list_keys(keys.tags_prefix(repository))]
        return [parse_tag(name) for name in names if name is not None]

    async def _tag_targets(self, repository: Repository) -> dict[Tag, Digest | None]:
        tags = await self._tag_names(repository)
        return dict(zip(tags, await gather((self._tag(repository, tag) for tag in tags), _AT_ONCE), strict=True))

    async def _check_needs(self, repository: Repository, digest: Digest, targets: dict[Tag, Digest | None]) -> None:
        """Raise `ManifestNeeded` if an index of a tag leads to `digest`."""
        seen: set[Digest] = set()
        for tag, target in targets.items():
            # The lists of referrers that clients keep under a tag named after a digest do not count.
            pending = [] if target is None or fallback_base(tag) else [target]
            while pending:
                parent = pending.pop()
                if parent in seen:
                    continue
                seen.add(parent)
                for child in await self._children(repository, parent):
                    if child == digest:
                        raise ManifestNeeded(
                            f"the index {repository}:{tag} needs {digest}; delete that tag first, or run"
                            f" `dockerproxy rm --force {repository}@{digest}`"
                        )
                    pending.append(child)

    async def _children(self, repository: Repository, digest: Digest) -> tuple[Digest, ...]:
        """Return the manifests that an index refers to."""
        media_type = _parse_media_type(
            await self._bucket.read_start(keys.media_type_key(repository, digest), _MAX_LINK)
        )
        if media_type is not None and media_type.lower() in KNOWN_TYPES and media_type.lower() not in INDEX_TYPES:
            return ()  # most are images, which need not be read
        content = await self._reads.read_manifest(digest)
        if content is None:
            return ()
        return await self._parser.parse(_children_of, content, media_type)

    # lists

    async def tags(self, repository: Repository, page: Page) -> NamePage:
        names = sorted(await self._tag_names(repository), key=sort_key)
        last = None if page.last is None else sort_key(page.last)
        return take_page((name for name in names if last is None or sort_key(name) > last), page.limit)

    async def repositories(self, page: Page) -> NamePage:
        if not page.limit:
            return NamePage([], False)
        after = "" if page.last is None else keys.catalog_mark(page.last)
        names: list[str] = []
        async for entry in self._bucket.list_keys(keys.CATALOG, after=after, limit=min(page.limit + 1, 1000)):
            name = keys.catalog_name(entry.key)
            if name is not None:
                names.append(name)
            if len(names) > page.limit:
                break
        return take_page(names, page.limit)

    async def referrers(
        self, repository: Repository, subject: Digest, artifact_type: str | None, after: str | None
    ) -> ReferrersPage:
        await self._index_referrers(repository)
        prefix = keys.referrers_prefix(repository, subject)
        entries = sorted(
            [
                (f"{int(entry.written * 1e9):020}-{entry.key.removeprefix(prefix)}", entry)
                async for entry in self._bucket.list_keys(prefix)
            ],
            key=lambda item: item[0],
        )
        entries = [item for item in entries if after is None or item[0] > after]
        descriptors: list[bytes] = []
        size, last = 0, None
        for start in range(0, min(len(entries), _MAX_REFERRERS), _AT_ONCE):
            batch = entries[start : start + _AT_ONCE]
            found = await gather((self._descriptor(repository, entry, artifact_type) for _, entry in batch), _AT_ONCE)
            for (name, _), descriptor in zip(batch, found, strict=True):
                if descriptor is not None:
                    size += len(descriptor)
                    if descriptors and size > _MAX_REFERRERS_SIZE:
                        return ReferrersPage(descriptors, last)
                    descriptors.append(descriptor)
                last = name
        return ReferrersPage(descriptors, last if len(entries) > _MAX_REFERRERS else None)

    async def _descriptor(self, repository: Repository, entry: ListedKey, artifact_type: str | None) -> bytes | None:
        """Return the descriptor of a referrer as JSON; None if it is of another type, or not in the repository."""
        digest = keys.referrer_of(entry.key)
        if digest is None:
            return None
        link, content = await gather(
            (
                self._bucket.read_start(key, _MAX_DESCRIPTOR)
                for key in (keys.manifest_key(repository, digest), entry.key)
            ),
            2,
        )
        return None if link is None or content is None else matching_descriptor(content, artifact_type)

    async def _index_referrers(self, repository: Repository) -> None:
        """Write the subjects of the manifests that another registry wrote, once for the bucket."""
        if repository in self._indexed:
            return
        key = keys.indexed_key(repository)
        if await self._bucket.size(key) is None:
            if not await self._has_manifests(repository):
                return  # and nothing is remembered for a name that anyone can invent
            async for digest in self._unindexed(repository):
                await self._index(repository, digest)
            await self._bucket.put(key, b"")
        self._indexed[repository] = True

    async def _unindexed(self, repository: Repository) -> AsyncIterator[Digest]:
        """Yield the manifests that have no subject key. The keys of one come together in a listing."""
        current: Digest | None = None
        names: set[str] = set()
        async for entry in self._bucket.list_keys(keys.revisions_prefix(repository)):
            revision = keys.revision_of(entry.key)
            if revision is None:
                continue
            if revision[0] != current:
                if current is not None and "link" in names and "subject" not in names:
                    yield current
                current, names = revision[0], set()
            names.add(revision[1])
        if current is not None and "link" in names and "subject" not in names:
            yield current

    async def _index(self, repository: Repository, digest: Digest) -> None:
        content = await self._reads.read_manifest(digest)
        if content is None:
            return
        media_type = _parse_media_type(
            await self._bucket.read_start(keys.media_type_key(repository, digest), _MAX_LINK)
        )
        detected, referrer = await self._parser.parse(_read_referrer, content, media_type, digest)
        await self._writer.write_notes(repository, digest, detected, referrer)


def _parse_link(content: bytes) -> Digest | None:
    try:
        return Digest.parse(content.decode("ascii").strip())
    except (DigestInvalid, UnicodeDecodeError):
        return None


def _parse_media_type(content: bytes | None) -> str | None:
    # It is sent in a header field, so refuse what another program may have written.
    text = (content or b"").decode("latin-1")
    return text if text and text.isascii() and text.isprintable() and len(text) < _MAX_LINK else None


def _detect_media_type(content: bytes) -> str:
    """Return the media type of a manifest that another registry stored, from its content."""
    try:
        return media_type_of(content)
    except ManifestInvalid:
        return "application/octet-stream"


def _children_of(content: bytes, media_type: str | None) -> tuple[Digest, ...]:
    try:
        return tuple(child.digest for child in parse_manifest(content, media_type).manifests)
    except ManifestInvalid:
        return ()


def _read_referrer(content: bytes, media_type: str | None, digest: Digest) -> tuple[str, Referrer | None]:
    """Return the media type of a manifest, and the referrer that it is, if it is one."""
    detected = media_type or _detect_media_type(content)
    try:
        return detected, make_referrer(parse_manifest(content, media_type), digest, len(content))
    except ManifestInvalid:
        return detected, None
