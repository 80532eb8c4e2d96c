"""The hosted registry's tree on disk: its parts, and the operations that change several of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from attrs import field, frozen

from dockerproxy.concurrency import KeyedLock, LocalKeyedLock
from dockerproxy.oci.manifests import fallback_base, fallback_tag
from dockerproxy.oci.names import Digest
from dockerproxy.oci.referrers import Referrer
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.contents import Contents
from dockerproxy.store.disk_reserve import DiskReserve
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.referrers import Referrers
from dockerproxy.store.uploads import UploadLimits, Uploads


@frozen
class HostedTree:
    """Durable storage of the hosted registry.

    Changing a repository's manifests or tags requires its lock: ``async with store.locks.hold(repository)``. The
    methods here block; call `link_manifest` and `remove_manifest` only while holding the lock.
    """

    layout: Layout
    blobs: Blobs
    links: Links
    uploads: Uploads
    referrers: Referrers
    reserve: DiskReserve
    locks: KeyedLock = field(factory=LocalKeyedLock)
    contents: Contents = field(init=False)

    @contents.default
    def _make_contents(self) -> Contents:
        return Contents(self.layout)

    @classmethod
    def from_layout(
        cls,
        layout: Layout,
        clock: Callable[[], float] = time.time,
        locks: KeyedLock | None = None,
        upload_limits: UploadLimits | None = None,
    ) -> HostedTree:
        """Return the store in `layout`. `clock` returns POSIX time; pass `locks` if other processes use the store."""
        blobs, links = Blobs(layout, True, clock), Links(layout, True)
        return cls(
            layout,
            blobs,
            links,
            Uploads(layout, clock, limits=upload_limits or UploadLimits()),
            Referrers(layout, blobs, links),
            DiskReserve(str(layout.root)),
            locks or LocalKeyedLock(),
        )

    def check_free_space(self) -> None:
        """Raise `OSError` (ENOSPC) if a push may store nothing more, even without the uploads that were given up."""
        try:
            self.reserve.check()
        except OSError:
            if not self.uploads.purge_given_up():
                raise
            self.reserve.check()

    def link_manifest(
        self, repository: str, digest: Digest, media_type: str, referrer: Referrer | None, tags: Sequence[str]
    ) -> None:
        """Link a stored manifest to the repository, and point `tags` to it."""
        old_signature = self.referrers.signature(repository)
        self.referrers.record(repository, digest, referrer)
        self.links.link_manifest(repository, digest, media_type)
        self.referrers.record_change(repository, old_signature)
        for tag in tags:
            self.links.set_tag(repository, tag, digest)

    def remove_manifest(self, repository: str, digest: Digest) -> bool:
        """Unlink a manifest and delete its tags. Return whether the repository had the manifest."""
        if not self.links.has_manifest(repository, digest):
            return False
        # Delete the tags first, so that no tag ever points to a missing manifest.
        for tag in self.links.tags(repository):
            if self.links.tag(repository, tag) == digest:
                self.links.remove_tag(repository, tag)
            elif fallback_base(tag) == fallback_tag(digest):
                self.links.mark_orphaned(repository, tag)  # gc deletes it, and what it leads to
        old_signature = self.referrers.signature(repository)
        subject = self.referrers.subject(repository, digest)
        was_linked = self.links.unlink_manifest(repository, digest)
        self.referrers.record_change(repository, old_signature)
        self.referrers.remove(repository, digest, subject)
        return was_linked
