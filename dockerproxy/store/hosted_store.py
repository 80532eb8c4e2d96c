"""The hosted registry's store: the parts of the tree, and the changes that concern several of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from attrs import field, frozen

from dockerproxy.concurrency import KeyedLock, LocalKeyedLock
from dockerproxy.oci.names import Digest
from dockerproxy.oci.referrers import Referrer
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.layout import Layout
from dockerproxy.store.links import Links
from dockerproxy.store.referrers import Referrers
from dockerproxy.store.uploads import Uploads


@frozen
class HostedStore:
    """What is kept below a root, durable. Whoever changes a repository's manifests or tags takes its turn for that.

    The methods here block, and are for who has the turn: ``async with store.turns.of(repository)``.
    """

    layout: Layout
    blobs: Blobs
    links: Links
    uploads: Uploads
    referrers: Referrers
    locks: KeyedLock = field(factory=LocalKeyedLock)

    @classmethod
    def from_layout(
        cls, layout: Layout, clock: Callable[[], float] = time.time, locks: KeyedLock | None = None
    ) -> HostedStore:
        """Return the store in `layout`. `clock`: POSIX time; `turns`: where other processes use it, too."""
        blobs, links = Blobs(layout, True, clock), Links(layout, True)
        return cls(
            layout, blobs, links, Uploads(layout, clock), Referrers(layout, blobs, links), locks or LocalKeyedLock()
        )

    def has_repository(self, repository: str) -> bool:
        """Say whether the repository has, or had, a blob or manifest."""
        directory = self.layout.repository(repository)
        return any(os.path.isdir(f"{directory}/{part}") for part in ("_manifests", "_layers"))

    def link_manifest(
        self, repository: str, digest: Digest, media_type: str, referrer: Referrer | None, tags: Sequence[str]
    ) -> None:
        """Let the repository have a manifest that is among the blobs, and let `tags` mean it."""
        old_signature = self.referrers.signature(repository)
        self.referrers.record(repository, digest, referrer)
        self.links.link_manifest(repository, digest, media_type)
        self.referrers.record_change(repository, old_signature)
        for tag in tags:
            self.links.set_tag(repository, tag, digest)

    def remove_manifest(self, repository: str, digest: Digest) -> bool:
        """Take a manifest from the repository, with its tags, and say whether it had it."""
        if not self.links.has_manifest(repository, digest):
            return False
        # The tags first: at no moment does one mean what is not there.
        for tag in self.links.tags(repository):
            if self.links.tag(repository, tag) == digest:
                self.links.remove_tag(repository, tag)
        old_signature = self.referrers.signature(repository)
        subject = self.referrers.subject(repository, digest)
        was_linked = self.links.unlink_manifest(repository, digest)
        self.referrers.record_change(repository, old_signature)
        self.referrers.remove(repository, digest, subject)
        return was_linked
