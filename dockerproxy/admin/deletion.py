"""Deletion of tags, manifests and repositories, hosted or cached.

Deleting from the hosted store removes only links, and garbage collection frees the blobs later. The cache has no
garbage collection, so its blobs are deleted at once. A later pull fetches them from upstream again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from dockerproxy.admin.inventory import Closure
from dockerproxy.admin.resolver import HOSTED, ImageRef
from dockerproxy.cache.space import CacheSpaceManager
from dockerproxy.oci.names import Digest
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.hosted_tree import HostedTree
from dockerproxy.store.needs import find_needs
from dockerproxy.store.records import Records


@frozen
class DeletionResult:
    """Numbers of deleted items. `blobs` and `bytes` are counted for the cache only."""

    tags: int = 0
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0


@frozen
class Deleter:
    """Deletes images from both stores. `records` are the cache's."""

    _reactor: Any
    _hosted_store: HostedTree
    _space: CacheSpaceManager
    _records: Records
    _thread: CooperativeThread = field(init=False)

    @_thread.default
    def _make_thread(self) -> CooperativeThread:
        return CooperativeThread(self._reactor)

    async def delete(self, ref: ImageRef) -> DeletionResult:
        """Delete the tag, manifest, blob or repository that `ref` names."""
        if ref.store.kind != HOSTED:
            return await self._delete_cached(ref)
        counts = {"tags": 0, "manifests": 0}
        async with self._hosted_store.locks.hold(ref.repository):
            await self._thread.run(self._unlink_hosted(ref, counts))
        return DeletionResult(**counts)

    async def tag_that_needs(self, ref: ImageRef) -> str | None:
        """Return a tag with an index that needs the hosted manifest `ref`. Return None if there is none."""
        if ref.store.kind != HOSTED or ref.digest is None:
            return None
        found: list[str] = []
        await self._thread.run(self._find_tag_that_needs(ref, found))
        return found[0] if found else None

    def _find_tag_that_needs(self, ref: ImageRef, found: list[str]) -> Iterator[None]:
        for need in find_needs(self._hosted_store.layout, self._hosted_store.links, ref.repository):
            if need is not None and need.digest == ref.digest:
                found.append(need.tag)
                return
            yield None

    # Hosted: runs in a thread while `delete` holds the repository's lock.

    def _unlink_hosted(self, ref: ImageRef, counts: dict[str, int]) -> Iterator[None]:
        store, repository = self._hosted_store, ref.repository
        if ref.tag is not None:
            counts["tags"] += store.links.remove_tag(repository, ref.tag)
            return
        for tag, digest in store.links.iter_tags(repository):
            if ref.digest in (None, digest):
                counts["tags"] += store.links.remove_tag(repository, tag)
            yield None
        for digest in store.links.manifests(repository):
            if ref.digest in (None, digest):
                counts["manifests"] += store.remove_manifest(repository, digest)
            yield None

    # Cached.

    async def _delete_cached(self, ref: ImageRef) -> DeletionResult:
        plan = _DeletionPlan(ref)
        await self._thread.run(plan.compute())
        sizes = {digest: ref.store.blobs.size(digest) for digest in plan.objects}
        await self._thread.run(self._unlink_cached(ref, plan))
        await self._space.purge(sizes)
        present_sizes = [size for size in sizes.values() if size is not None]
        return DeletionResult(len(plan.tags), len(plan.manifests), len(present_sizes), sum(present_sizes))

    def _unlink_cached(self, ref: ImageRef, plan: _DeletionPlan) -> Iterator[None]:
        links, repository = ref.store.links, ref.repository
        for tag in plan.tags:
            links.remove_tag(repository, tag)
            self._records.remove("tag", repository, tag)
            yield None
        for digest in plan.manifests:
            links.unlink_manifest(repository, digest)
            yield None
        for digest in plan.blobs:
            links.unlink_layer(repository, digest)
            yield None


class _DeletionPlan:
    """The links and objects to delete for a reference to the cache.

    A repository is deleted as a whole. A digest selects that manifest or blob. A tag selects everything that no other
    tag, and no untagged manifest, of the repository reaches.

    `objects` are the blobs and manifests to delete from the store. An object that another repository links is kept,
    unless it was named by its digest: it may be damaged.
    """

    def __init__(self, ref: ImageRef) -> None:
        self._ref = ref
        self.tags: list[str] = []
        self.manifests: set[Digest] = set()
        self.blobs: set[Digest] = set()
        self.objects: set[Digest] = set()

    def compute(self) -> Iterator[None]:
        """Fill the attributes. Each step blocks briefly."""
        ref, links = self._ref, self._ref.store.links
        if ref.digest is not None:
            if links.has_manifest(ref.repository, ref.digest):
                self.manifests.add(ref.digest)
            if links.has_layer(ref.repository, ref.digest):
                self.blobs.add(ref.digest)
            self.objects.add(ref.digest)
            return
        if ref.tag is None:
            self.tags = links.tags(ref.repository)
            self.manifests.update(links.manifests(ref.repository))
            self.blobs.update(links.layers(ref.repository))
            yield None
        else:
            self.tags = [ref.tag]
            yield from self._add_exclusive_to_tag(ref.tag)
        self.objects = self.manifests | self.blobs
        for other in links.repositories():
            if other != ref.repository:
                self.objects -= {digest for digest in self.objects if self._is_linked(other, digest)}
                yield None

    def _add_exclusive_to_tag(self, tag: str) -> Iterator[None]:
        links, repository = self._ref.store.links, self._ref.repository
        target, others = Closure(self._ref.store, repository), Closure(self._ref.store, repository)
        for name in links.tags(repository):
            digest = links.tag(repository, name)
            if digest is not None:
                yield from (target if name == tag else others).reach([digest])
        self.manifests = target.manifests - others.manifests
        # Manifests that were pulled by digest have no tag, but keep their blobs.
        yield from others.reach(digest for digest in links.manifests(repository) if digest not in self.manifests)
        self.blobs = target.blobs - others.blobs

    def _is_linked(self, repository: str, digest: Digest) -> bool:
        links = self._ref.store.links
        return links.has_layer(repository, digest) or links.has_manifest(repository, digest)
