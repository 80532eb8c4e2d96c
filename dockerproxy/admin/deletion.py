"""Deletion of tags, manifests and repositories, hosted or cached.

Deleting from the hosted store removes only links, and garbage collection frees the blobs later. The cache has no
garbage collection, so its blobs are deleted at once. A later pull fetches them from upstream again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen
from twisted.logger import Logger

from dockerproxy.admin.inventory import Closure
from dockerproxy.admin.resolver import HOSTED, ImageRef
from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.concurrency import in_thread, shield
from dockerproxy.errors import RegistryError
from dockerproxy.oci.names import Digest, Repository, parse_tag
from dockerproxy.registry.audit import AuditLog
from dockerproxy.registry.hosted_store import HostedStore
from dockerproxy.registry.principal import Principal
from dockerproxy.store.disk_access import DiskAccess
from dockerproxy.store.needs import find_needs
from dockerproxy.store.records import Records

log = Logger()


@frozen
class DeletionResult:
    """Numbers of deleted items. `blobs` and `bytes` are counted for the cache only."""

    tags: int = 0
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0


@frozen
class Deleter:
    """Deletes images from both stores. `disk` reads the hosted one; `records` are the cache's.

    `is_pinned` says whether a tag or digest of a cached repository, or anything of it, is pinned.
    """

    _reactor: Any
    _disk: DiskAccess
    _hosted_store: HostedStore
    _space: CacheSpaceManager
    _records: Records
    _audit: AuditLog
    _is_pinned: Callable[[str, str | None], bool]

    async def delete(self, principal: Principal, ref: ImageRef) -> DeletionResult:
        """Delete the tag, manifest, blob or repository that `ref` names. Log and record it with `principal`."""
        deletion = self._delete_hosted(ref) if ref.store.kind == HOSTED else self._delete_cached(ref)
        # To its end even if the command is interrupted: a thread cannot be, and the lock is held as long as it works.
        try:
            result = await shield(deletion, f"deletion of {ref}")
        except (OSError, RegistryError) as error:
            self._audit.record(principal, "remove", f"{ref} ({ref.store.kind})", f"failed: {error}")
            raise
        self._audit.record(principal, "remove", f"{ref} ({ref.store.kind})")
        log.info("{principal} removed {name} ({kind})", principal=str(principal), name=str(ref), kind=ref.store.kind)
        return result

    async def reason_to_keep(self, ref: ImageRef) -> str | None:
        """Return why `ref` is to be deleted by force only, and what to do first. Return None if nothing needs it."""
        if ref.store.kind != HOSTED:
            return self._pin_of(ref)
        tag = None if ref.digest is None else await self._disk.run(self._find_tag_that_needs, ref)
        return None if tag is None else f"{ref.repository}:{tag} needs {ref.digest}; remove that tag first"

    def _pin_of(self, ref: ImageRef) -> str | None:
        name = ref.tag if ref.digest is None else str(ref.digest)
        if not self._is_pinned(ref.repository, name):
            return None
        return f"{ref} has pinned images; unpin them first" if name is None else f"{ref} is pinned; unpin it first"

    def _find_tag_that_needs(self, ref: ImageRef) -> str | None:
        needs = find_needs(ref.store.contents, ref.store.links, ref.repository)
        return next((need.tag for need in needs if need.digest == ref.digest), None)

    # Hosted.

    async def _delete_hosted(self, ref: ImageRef) -> DeletionResult:
        repository = Repository(ref.repository)  # the store has it, whatever another registry named it
        if ref.tag is not None:
            return DeletionResult(tags=int(await self._hosted_store.remove_tag(repository, parse_tag(ref.tag))))
        removed = await self._hosted_store.remove_images(repository, ref.digest)
        return DeletionResult(removed.tags, removed.manifests)

    # Cached.

    async def _delete_cached(self, ref: ImageRef) -> DeletionResult:
        plan = await in_thread(self._reactor, _DeletionPlan.compute, ref)
        await in_thread(self._reactor, self._unlink_cached, ref, plan)
        await self._space.purge(plan.sizes)
        present_sizes = [size for size in plan.sizes.values() if size is not None]
        return DeletionResult(len(plan.tags), len(plan.manifests), len(present_sizes), sum(present_sizes))

    def _unlink_cached(self, ref: ImageRef, plan: _DeletionPlan) -> None:
        links, repository = ref.store.links, ref.repository
        for tag in plan.tags:
            links.remove_tag(repository, tag)
            self._records.remove("tag", repository, tag)
        for digest in plan.manifests:
            links.unlink_manifest(repository, digest)
        for digest in plan.blobs:
            links.unlink_layer(repository, digest)


class _DeletionPlan:
    """The links and objects to delete for a reference to the cache.

    A repository is deleted as a whole. A digest selects that manifest or blob. A tag selects everything that no other
    tag, and no untagged manifest, of the repository reaches.

    `sizes` has the sizes of the blobs and manifests to delete from the store, None if one is missing. One that another
    repository links is kept, unless it was named by its digest: it may be damaged.
    """

    def __init__(self, ref: ImageRef) -> None:
        self._ref = ref
        self.tags: list[str] = []
        self.manifests: set[Digest] = set()
        self.blobs: set[Digest] = set()
        self.sizes: dict[Digest, int | None] = {}

    @classmethod
    def compute(cls, ref: ImageRef) -> _DeletionPlan:
        """Return the plan for `ref`. Blocks."""
        plan = cls(ref)
        plan.sizes = {digest: ref.store.contents.size(digest) for digest in plan._find_objects()}
        return plan

    def _find_objects(self) -> set[Digest]:
        """Find the links to delete. Return the blobs and manifests to delete."""
        ref, links = self._ref, self._ref.store.links
        if ref.digest is not None:
            if links.has_manifest(ref.repository, ref.digest):
                self.manifests.add(ref.digest)
            if links.has_layer(ref.repository, ref.digest):
                self.blobs.add(ref.digest)
            return {ref.digest}
        if ref.tag is None:
            self.tags = links.tags(ref.repository)
            self.manifests.update(links.manifests(ref.repository))
            self.blobs.update(links.layers(ref.repository))
        else:
            self.tags = [ref.tag]
            self._add_exclusive_to_tag(ref.tag)
        objects = self.manifests | self.blobs
        for other in links.repositories():
            if other != ref.repository:
                objects -= {digest for digest in objects if self._is_linked(other, digest)}
        return objects

    def _add_exclusive_to_tag(self, tag: str) -> None:
        links, repository = self._ref.store.links, self._ref.repository
        target, others = Closure(self._ref.store, repository), Closure(self._ref.store, repository)
        for name in links.tags(repository):
            digest = links.tag(repository, name)
            if digest is not None:
                (target if name == tag else others).reach([digest])
        self.manifests = target.manifests - others.manifests
        # Manifests that were pulled by digest have no tag, but keep their blobs.
        others.reach(digest for digest in links.manifests(repository) if digest not in self.manifests)
        self.blobs = target.blobs - others.blobs

    def _is_linked(self, repository: str, digest: Digest) -> bool:
        links = self._ref.store.links
        return links.has_layer(repository, digest) or links.has_manifest(repository, digest)
