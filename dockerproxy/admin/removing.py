"""Removing what an operator names: hosted tags, manifests and repositories, and what is cached.

Of what is hosted only the names go, and garbage collection takes the content. What is cached has none: it goes at
once, and comes back from upstream when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attrs import field, frozen

from dockerproxy.admin.inventory import Reached
from dockerproxy.admin.names import HOSTED, Named
from dockerproxy.cache.room import CacheRoom
from dockerproxy.oci.names import Digest
from dockerproxy.store.hosting import HostedStore
from dockerproxy.store.records import Records
from dockerproxy.store.slices import Slices


@frozen
class Gone:
    """How much went; `blobs` and `bytes` of what was cached only."""

    tags: int = 0
    manifests: int = 0
    blobs: int = 0
    bytes: int = 0


@frozen
class Remover:
    """Removes from both shelves. `records` are the cache's."""

    _reactor: Any
    _store: HostedStore
    _room: CacheRoom
    _records: Records
    _slices: Slices = field(init=False)

    @_slices.default
    def _make_slices(self) -> Slices:
        return Slices(self._reactor)

    async def remove(self, named: Named) -> Gone:
        """Remove what is named."""
        if named.shelf.where != HOSTED:
            return await self._purge(named)
        counts = {"tags": 0, "manifests": 0}
        async with self._store.turns.of(named.repository):
            await self._slices.run(self._unlink(named, counts))
        return Gone(**counts)

    # hosted; in a thread, for who has the repository's turn

    def _unlink(self, named: Named, counts: dict[str, int]) -> Iterator[None]:
        store, repository = self._store, named.repository
        for tag in store.links.tags(repository):
            if named.tag in (None, tag) and named.digest in (None, store.links.tag(repository, tag)):
                counts["tags"] += store.links.remove_tag(repository, tag)
            yield None
        if named.tag is not None:
            return
        for digest in store.links.manifests(repository):
            if named.digest in (None, digest):
                counts["manifests"] += store.remove_manifest(repository, digest)
            yield None

    # cached

    async def _purge(self, named: Named) -> Gone:
        doomed = _Doomed(named)
        await self._slices.run(doomed.steps())
        sizes = {digest: named.shelf.blobs.size(digest) for digest in doomed.contents}
        await self._slices.run(self._forget(named, doomed))
        await self._room.purge(sizes)
        there = [size for size in sizes.values() if size is not None]
        return Gone(len(doomed.tags), len(doomed.manifests), len(there), sum(there))

    def _forget(self, named: Named, doomed: _Doomed) -> Iterator[None]:
        links, repository = named.shelf.links, named.repository
        for tag in doomed.tags:
            links.remove_tag(repository, tag)
            self._records.remove("tag", repository, tag)
            yield None
        for digest in doomed.manifests:
            links.unlink_manifest(repository, digest)
            yield None
        for digest in doomed.blobs:
            links.unlink_layer(repository, digest)
            yield None


class _Doomed:
    """What of a cached repository has to go: all of it, a manifest or blob, or what no other tag of it leads to.

    `contents`: those that no other repository has, but one that is named by its digest in any case. It may be damaged.
    """

    def __init__(self, named: Named) -> None:
        self._named = named
        self.tags: list[str] = []
        self.manifests: set[Digest] = set()
        self.blobs: set[Digest] = set()
        self.contents: set[Digest] = set()

    def steps(self) -> Iterator[None]:
        """Find out. Blocks, a moment a step."""
        named, links = self._named, self._named.shelf.links
        if named.digest is not None:
            if links.has_manifest(named.repository, named.digest):
                self.manifests.add(named.digest)
            if links.has_layer(named.repository, named.digest):
                self.blobs.add(named.digest)
            self.contents.add(named.digest)
            return
        if named.tag is None:
            self.tags = links.tags(named.repository)
            self.manifests.update(links.manifests(named.repository))
            self.blobs.update(links.layers(named.repository))
            yield None
        else:
            self.tags = [named.tag]
            yield from self._only_by_tag(named.tag)
        self.contents = self.manifests | self.blobs
        for other in links.repositories():
            if other != named.repository:
                self.contents -= {digest for digest in self.contents if self._is_linked(other, digest)}
                yield None

    def _only_by_tag(self, tag: str) -> Iterator[None]:
        links, repository = self._named.shelf.links, self._named.repository
        wanted, others = Reached(self._named.shelf, repository), Reached(self._named.shelf, repository)
        for name in links.tags(repository):
            digest = links.tag(repository, name)
            if digest is not None:
                yield from (wanted if name == tag else others).spread([digest])
        self.manifests = wanted.manifests - others.manifests
        # What was pulled by its digest has no tag.
        yield from others.spread(digest for digest in links.manifests(repository) if digest not in self.manifests)
        self.blobs = wanted.blobs - others.blobs

    def _is_linked(self, repository: str, digest: Digest) -> bool:
        links = self._named.shelf.links
        return links.has_layer(repository, digest) or links.has_manifest(repository, digest)
