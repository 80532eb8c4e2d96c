"""Writes to a bucket, in the order in which other nodes may rely on them: contents, links, manifests, tags.

Everything that is written, or that a caller counts on, is kept from garbage collection (`gc_runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from dockerproxy.bucket import keys
from dockerproxy.bucket.gc_runs import Times, catalog_entry, content_entry, link_entry, tag_entry
from dockerproxy.bucket.gc_view import GCView, Published
from dockerproxy.bucket.s3 import S3Bucket
from dockerproxy.bucket.store_errors import retry_after
from dockerproxy.concurrency import gather
from dockerproxy.errors import ManifestBlobUnknown, StoreUnavailable
from dockerproxy.oci.names import Digest, Repository, Tag
from dockerproxy.oci.pushed_manifest import PushedManifest
from dockerproxy.oci.referrers import Referrer
from dockerproxy.store.referrers import format_referrer

_AT_ONCE = 16  # requests that one push sends to the store
_MAX_WRITES = 5  # times that a manifest is written if it is deleted at the same time
_MAX_MISSING_LISTED = 10  # missing references that an error message lists


@frozen
class BucketContents:
    """Writes contents and links, in the order in which they may be relied on.

    A look at an object counts on it, so that a run of gc that has condemned it lets it stay.
    """

    _bucket: S3Bucket
    _view: GCView

    async def add_bytes(self, content: bytes, digest: Digest) -> None:
        """Store `content`, which matches `digest`, as a blob."""
        await self._view.settle([content_entry(digest)], self._view.current, set())
        await self._bucket.put(keys.blob_key(digest), content)

    async def add_file(self, fd: int, size: int, digest: Digest) -> None:
        """Store the verified file `fd` as a blob, also if one is there, because that may be damaged.

        A client that asks first sends no blob that is there, and to compare the two costs as much as to write.
        """
        await self._view.settle([content_entry(digest)], self._view.current, set())
        await self._bucket.put_file(keys.blob_key(digest), fd, size, digest)

    async def link_layer(self, repository: Repository, digest: Digest) -> None:
        """Make a blob that is there a part of the repository."""
        await self._view.settle([link_entry(repository, digest)], self._view.current, set())
        await self._bucket.put(keys.layer_key(repository, digest), str(digest).encode())

    async def size(self, repository: Repository, digest: Digest, published: Published | None = None) -> int | None:
        """Return the size of a blob that the repository has, or None.

        `published` has the entries that gc has condemned, if the caller has just looked.
        """
        if not await self.count_on(repository, digest, published):
            return None
        linked, size = await gather(
            (self._bucket.size(key) for key in (keys.layer_key(repository, digest), keys.blob_key(digest))), 2
        )
        return size if linked is not None else None

    async def has_reference(
        self, repository: Repository, digest: Digest, published: Published | None = None, *, is_manifest: bool
    ) -> bool:
        """Return whether the repository has a blob, or a manifest if `is_manifest`, with its content."""
        # BuildKit's cache is an index of blobs. A child may therefore be a blob too, as in CNCF distribution.
        if is_manifest and await self.count_on(repository, digest, published):
            if await self._bucket.size(keys.manifest_key(repository, digest)) is not None:
                return await self._bucket.size(keys.blob_key(digest)) is not None
        return await self.size(repository, digest, published) is not None

    async def count_on(self, repository: Repository, digest: Digest, published: Published | None = None) -> bool:
        """Keep a content and its link from gc. Return False if gc is deleting one of them at this moment."""
        condemned = self._view.current if published is None else published
        if condemned.is_empty:
            return True
        return await self._view.count_on([content_entry(digest), link_entry(repository, digest)], condemned)


@frozen
class ManifestWriter:
    """Writes manifests and their tags.

    `view` knows the runs of gc. `boot_clock` gives the seconds since the machine started, with those for which it
    slept.
    """

    bucket: S3Bucket
    view: GCView
    contents: BucketContents
    _boot_clock: Callable[[], float]

    @classmethod
    def of(cls, reactor: Any, bucket: S3Bucket, boot_clock: Callable[[], float]) -> ManifestWriter:
        """Return what writes to `bucket`."""
        view = GCView(reactor, bucket, Times.scaled(bucket.location.time_scale))
        return cls(bucket, view, BucketContents(bucket, view), boot_clock)

    async def commit(
        self, repository: Repository, manifest: PushedManifest, tags: Sequence[Tag], *, sparse: bool = False
    ) -> None:
        """Store a manifest, and point `tags` to it; see `registry.hosted_store.HostedStore.commit_manifest`."""
        await self._check_references(repository, manifest, sparse, self.view.current)
        digest = manifest.digest
        entries = [content_entry(digest), link_entry(repository, digest), catalog_entry(repository)]
        entries += [tag_entry(repository, tag) for tag in tags]
        gone: set[tuple[int, str]] = set()
        for _ in range(_MAX_WRITES):
            began = self._boot_clock()
            written = await self._write_manifest(repository, manifest)
            # After the link was written: see `gc_runs`.
            published = await self.view.look()
            is_changed = await self.view.settle(entries, published, gone)
            if not is_changed and await self._has_all(written):  # else a run that has ended by now has deleted it
                break
        else:
            raise StoreUnavailable(
                f"{repository}@{digest} was deleted {_MAX_WRITES} times while it was pushed; push again",
                headers=retry_after(),
            )
        await self._check_references(repository, manifest, sparse, published)
        self._check_time(began)
        await gather((self._set_tag(repository, tag, digest) for tag in tags), _AT_ONCE)
        self._check_time(began)

    def _check_time(self, began: float) -> None:
        """Raise `StoreUnavailable` if gc may have looked for tags before ours was there."""
        if self._boot_clock() - began > self.view.times.push:
            raise StoreUnavailable(
                f"{self.bucket.location} took more than {self.view.times.push:g} s to store the manifest; push again",
                headers=retry_after(),
            )

    async def _write_manifest(self, repository: Repository, manifest: PushedManifest) -> list[str]:
        """Write a manifest without tags, and return the keys. It is written even if it is there: its age counts."""
        digest = manifest.digest
        await self.bucket.put(keys.blob_key(digest), manifest.content)
        notes = await self.write_notes(repository, digest, manifest.media_type, manifest.referrer)
        await self.bucket.put(keys.manifest_key(repository, digest), str(digest).encode())
        await self.bucket.put(keys.catalog_key(repository), b"")
        return [*notes, keys.blob_key(digest), keys.manifest_key(repository, digest), keys.catalog_key(repository)]

    async def _has_all(self, written: Sequence[str]) -> bool:
        return None not in await gather(map(self.bucket.size, written), _AT_ONCE)

    async def _set_tag(self, repository: Repository, tag: Tag, digest: Digest) -> None:
        # Same order as distribution (tagstore.go, Tag): the current manifest is always in the index.
        link = str(digest).encode()
        await self.bucket.put(keys.tag_index_key(repository, tag, digest), link)
        await self.bucket.put(keys.tag_key(repository, tag), link)

    async def write_notes(
        self, repository: Repository, digest: Digest, media_type: str, referrer: Referrer | None
    ) -> list[str]:
        """Write the objects beside the link to a manifest, which comes last. Return their keys."""
        objects = {
            keys.media_type_key(repository, digest): media_type.encode(),
            keys.subject_key(repository, digest): b"-" if referrer is None else str(referrer.subject).encode(),
        }
        if referrer is not None:
            objects[keys.referrer_key(repository, referrer.subject, digest)] = format_referrer(referrer)
        await gather((self.bucket.put(key, content) for key, content in objects.items()), _AT_ONCE)
        return list(objects)

    async def _check_references(
        self, repository: Repository, manifest: PushedManifest, sparse: bool, published: Published
    ) -> None:
        """Count on the references of a manifest. Raise `ManifestBlobUnknown` if one is not there."""
        required = [
            (digest, is_manifest)
            for digest, is_manifest in manifest.required_references()
            if not (sparse and is_manifest)
        ]
        found = await gather(
            (
                self.contents.has_reference(repository, digest, published, is_manifest=is_manifest)
                for digest, is_manifest in required
            ),
            _AT_ONCE,
        )
        if manifest.subject is not None:  # it may be missing, but if it is there, it stays
            await self.contents.count_on(repository, manifest.subject, published)
        missing = [str(digest) for (digest, _), is_here in zip(required, found, strict=True) if not is_here]
        if missing:
            more = f" and {len(missing) - _MAX_MISSING_LISTED} more" if len(missing) > _MAX_MISSING_LISTED else ""
            raise ManifestBlobUnknown(
                f"{repository} lacks references of the manifest: {', '.join(missing[:_MAX_MISSING_LISTED])}{more}"
            )
