"""Cache space: reserves space for downloads, and evicts the least recently used blobs."""

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
"""Seconds between two rounds of maintenance, which expires blobs and rescans the disk."""

_STALE_INGEST_AGE = 86400.0  # seconds after which an abandoned partial download is deleted
_MIN_FREE_BYTES = 16 * 1024 * 1024  # bytes kept free on the disk for links, records and other programs

log = Logger()


class CacheSpace(Protocol):
    """The interface of the cache space for downloads and readers; see `CacheSpaceManager`."""

    async def reserve(self, digest: Digest, size: int, existing_size: int) -> bool: ...

    def release(self, digest: Digest) -> None: ...

    async def commit(self, ingest: Ingest) -> None: ...

    async def record(self, digest: Digest, size: int) -> None: ...

    def pin(self, digest: Digest) -> None: ...

    def unpin(self, digest: Digest) -> None: ...

    async def usage(self) -> tuple[int, int]: ...


class CacheSpaceManager:
    """Keeps the cache within its limit.

    Space for a download is reserved before it is written. A reserved blob is never evicted.
    """

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
        """Return the service that runs `maintain`, first at start."""
        timer = TimerService(  # type: ignore[no-untyped-call]
            MAINTENANCE_INTERVAL, lambda: spawn(self.maintain(), "cache maintenance")
        )
        timer.clock = self._reactor
        return timer

    async def maintain(self) -> None:
        """Remove abandoned downloads and rescan the disk.

        Then evict blobs that were unused for `inactive` seconds, or that exceed the limit.
        """
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
        """Reserve space for a blob of `size` bytes, `existing_size` of which are already on disk.

        Return False if that is impossible. Call it again as a blob of unknown size grows. The caller must call
        `release` at the end.
        """
        self.index.remove(digest)  # an earlier partial download is included in `size`
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
        """End a reservation, if there is one. The bytes on disk then count, and may be evicted."""
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
        """Mark a blob as used now."""
        self.index.touch(digest, self._clock())

    def pin(self, digest: Digest) -> None:
        """Mark a blob as used now, and prevent its eviction until `unpin`."""
        self.touch(digest)
        self.index.pin(digest)

    def unpin(self, digest: Digest) -> None:
        """Undo one `pin`."""
        self.index.unpin(digest)

    async def commit(self, ingest: Ingest) -> None:
        """Publish a complete blob. Raise `OSError`."""
        size = ingest.size
        await in_thread(self._reactor, ingest.commit, self._blobs)
        await self.record(ingest.digest, size)

    async def record(self, digest: Digest, size: int) -> None:
        """Count a blob that was written, and evict others if the limit is exceeded."""
        self._add(digest, size)
        self.index.pin(digest)
        try:
            with suppress(CacheFull):
                await self._evict(self.index.evict(0))
        finally:
            self.index.unpin(digest)

    async def usage(self) -> tuple[int, int]:
        """Return the bytes used, and the limit."""
        return self.index.total, self.index.limit

    async def purge(self, digests: Iterable[Digest]) -> None:
        """Remove blobs even if they are in use. Open readers can still read to the end."""
        purge_list = list(digests)
        for digest in purge_list:
            self.index.remove(digest)
        await self._evict(purge_list)

    def _add(self, digest: Digest, size: int) -> None:
        self.index.add(digest, size, self._clock())

    async def _fits_on_disk(self, size: int) -> bool:
        """Return whether the disk has `size` bytes free, after evicting blobs if necessary."""
        shortfall = size + _MIN_FREE_BYTES - await in_thread(self._reactor, self._free_bytes)
        if shortfall > 0:
            # Evict as if the limit were lower by the shortfall, so that the least recently used go first here too.
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
            log.info("evicting {count} blobs", count=len(digests))
            await in_thread(self._reactor, self._remove_blobs, digests)

    def _remove_blobs(self, digests: list[Digest]) -> None:
        for digest in digests:
            # Discard the partial download first: while the blob exists, no process starts a download.
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
    log.error("cannot remove {digest} from the cache: {reason}", digest=str(digest), reason=error.strerror)


def _ingest_entry(layout: Layout, digest: Digest) -> Entry | None:
    """Return the size and date of a partial download; None if there is none."""
    try:
        status = os.stat(layout.ingest(digest))
    except FileNotFoundError:
        return None
    return Entry(digest, status.st_size, status.st_mtime)
