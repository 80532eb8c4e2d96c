"""The room that the cache has: made for what comes, by what was not used for longest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import inf
from typing import Any, Protocol

from twisted.application.internet import TimerService
from twisted.logger import Logger

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.eviction import Entry
from dockerproxy.store.ingest import Ingest, stale_ingests
from dockerproxy.store.layout import Layout
from dockerproxy.store.lru_index import CacheFull, LRUIndex, Rescan

MAINTENANCE_INTERVAL = 600.0
"""Seconds between two looks at what is too old, and at what the disk really holds."""

_STALE_INGEST_AGE = 86400.0  # seconds after which a download that nobody took up is thrown away
_MIN_FREE_BYTES = 16 * 1024 * 1024  # bytes left free on the disk: links, records and other programs need some

log = Logger()


class CacheSpace(Protocol):
    """What downloads and reading ask of the room; see `CacheRoom`."""

    async def reserve(self, digest: Digest, size: int, existing_size: int) -> bool: ...

    def release(self, digest: Digest) -> None: ...

    async def commit(self, ingest: Ingest) -> None: ...

    async def record(self, digest: Digest, size: int) -> None: ...

    def pin(self, digest: Digest) -> None: ...

    def unpin(self, digest: Digest) -> None: ...

    async def usage(self) -> tuple[int, int]: ...


class CacheSpaceManager:
    """Keeps the cache within its limit. What is under way is reserved before it is written, and never chosen to go."""

    def __init__(
        self,
        reactor: Any,
        layout: Layout,
        blobs: Blobs,
        *,
        limit: int,
        inactive: float,
        clock: Callable[[], float],
        cooperative_thread: CooperativeThread | None = None,
    ) -> None:
        self._reactor = reactor
        self._cooperative_thread = cooperative_thread or CooperativeThread(reactor)
        self._layout = layout
        self._blobs = blobs
        self._inactive = inactive
        self._clock = clock
        self._reservations: set[Digest] = set()
        self.index = LRUIndex(limit)

    def service(self) -> TimerService:
        """Return the service that maintains the cache; its first round is at start."""
        timer = TimerService(  # type: ignore[no-untyped-call]
            MAINTENANCE_INTERVAL, lambda: spawn(self.maintain(), "the cache's maintenance")
        )
        timer.clock = self._reactor
        return timer

    async def maintain(self) -> None:
        """Count what the disk holds; remove what is over the limit, was not used for too long, or was abandoned."""
        rescan = self.index.start_rescan()
        try:
            await self._cooperative_thread.run(self._scan(rescan))
            self.index.apply_rescan(rescan)
        finally:
            self.index.abort_rescan()
        await self._cooperative_thread.run(rescan.clear_incrementally())
        while expired := self.index.expire(self._inactive, self._clock()):
            await self._evict(expired)

    async def reserve(self, digest: Digest, size: int, existing_size: int) -> bool:
        """Make room for a blob of `size` bytes, of which `present` are on the disk already, if that can be.

        For a blob whose size nobody tells it is called again as that grows. `release` has to follow.
        """
        self.index.remove(digest)  # what was left of it from before is part of it
        try:
            evicted = self.index.evict(size)
        except CacheFull:
            return False
        self.index.add(digest, size, self._clock())
        if digest not in self._reservations:
            self._reservations.add(digest)
            self.index.pin(digest)
        await self._evict(evicted)
        return await self._fits_on_disk(size - existing_size)

    def release(self, digest: Digest) -> None:
        """End what `reserve` began, if it did: from now on what is on the disk counts, and may go."""
        if digest not in self._reservations:
            return
        self._reservations.remove(digest)
        self.index.unpin(digest)
        if not self._blobs.exists(digest):
            self.index.remove(digest)
            partial_entry = _ingest_entry(self._layout, digest)
            if partial_entry is not None:
                self._add(digest, partial_entry.size)

    def touch(self, digest: Digest) -> None:
        """Note that a content is used now."""
        self.index.touch(digest, self._clock())

    def pin(self, digest: Digest) -> None:
        """Note that a content is used now and must not go before `let_go`."""
        self.touch(digest)
        self.index.pin(digest)

    def unpin(self, digest: Digest) -> None:
        """End a `hold`."""
        self.index.unpin(digest)

    async def commit(self, ingest: Ingest) -> None:
        """Publish a blob that is complete. Raises OSError."""
        size = ingest.size
        await in_thread(self._reactor, ingest.commit, self._blobs)
        await self.record(ingest.digest, size)

    async def record(self, digest: Digest, size: int) -> None:
        """Count a content that was written, and make others go where it is one too many."""
        self._add(digest, size)
        self.index.pin(digest)
        try:
            with suppress(CacheFull):
                await self._evict(self.index.evict(0))
        finally:
            self.index.unpin(digest)

    async def usage(self) -> tuple[int, int]:
        """Return how many bytes contents take, and how many they may."""
        return self.index.total, self.index.limit

    async def purge(self, digests: Iterable[Digest]) -> None:
        """Remove contents, whoever may use them; who reads one goes on reading."""
        purge_list = list(digests)
        for digest in purge_list:
            self.index.remove(digest)
        await self._evict(purge_list)

    def _add(self, digest: Digest, size: int) -> None:
        self.index.add(digest, size, self._clock())

    async def _fits_on_disk(self, size: int) -> bool:
        """Say whether the disk has `wanted` bytes, after making others go for it where it has not."""
        shortfall = size + _MIN_FREE_BYTES - await in_thread(self._reactor, self._free_bytes)
        if shortfall > 0:
            # As if the limit were that much nearer: the least recently used go first here too.
            try:
                await self._evict(self.index.evict(self.index.limit - self.index.total + shortfall))
            except CacheFull:
                return False
        return True

    def _free_bytes(self) -> int:
        status = os.statvfs(self._layout.root)
        return status.f_bavail * status.f_frsize

    async def _evict(self, digests: list[Digest]) -> None:
        if digests:
            log.info("{count} contents leave the cache", count=len(digests))
            await in_thread(self._reactor, self._remove_blobs, digests)

    def _remove_blobs(self, digests: list[Digest]) -> None:
        for digest in digests:
            # What there is of one that did not come whole goes first: while there is a content nobody fetches it.
            if _ingest_entry(self._layout, digest) is not None:
                self._discard_ingest(digest)
            try:
                self._blobs.remove(digest)
            except OSError as error:
                _log_removal_error(digest, error)

    def _discard_ingest(self, digest: Digest) -> None:
        try:
            ingest = Ingest.open(self._layout, digest)
            if ingest is not None:
                try:
                    ingest.discard()
                finally:
                    ingest.release()
        except OSError as error:
            _log_removal_error(digest, error)

    def _scan(self, rescan: Rescan) -> Iterator[None]:
        for digest in stale_ingests(self._layout, self._clock() - _STALE_INGEST_AGE):
            self._discard_ingest(digest)
            yield None
        for digest in stale_ingests(self._layout, inf):
            partial_entry = _ingest_entry(self._layout, digest)
            if partial_entry is not None:
                rescan.add(partial_entry)
            yield None
        for entry in self._blobs.walk():
            rescan.add(entry)
            yield None
        yield from rescan.sort()


def _log_removal_error(digest: Digest, error: OSError) -> None:
    log.error("{digest} cannot be removed: {reason}", digest=str(digest), reason=error.strerror)


def _ingest_entry(layout: Layout, digest: Digest) -> Entry | None:
    """Return what there is of a blob that is, or was, under way."""
    try:
        status = os.stat(layout.ingest(digest))
    except FileNotFoundError:
        return None
    return Entry(digest, status.st_size, status.st_mtime)
