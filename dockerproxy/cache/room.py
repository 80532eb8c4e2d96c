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
from dockerproxy.store.eviction import Entry
from dockerproxy.store.ingest import Ingest, stale_ingests
from dockerproxy.store.layout import Layout
from dockerproxy.store.slices import Slices
from dockerproxy.store.usage import DoesNotFit, Recount, Usage

MAINTENANCE = 600.0
"""Seconds between two looks at what is too old, and at what the disk really holds."""

_ABANDONED = 86400.0  # seconds after which a download that nobody took up is thrown away
_RESERVE = 16 * 1024 * 1024  # bytes left free on the disk: links, records and other programs need some

log = Logger()


class Room(Protocol):
    """What downloads and reading ask of the room; see `CacheRoom`."""

    async def reserve(self, digest: Digest, size: int, present: int) -> bool: ...

    def release(self, digest: Digest) -> None: ...

    async def keep(self, ingest: Ingest) -> None: ...

    async def count(self, digest: Digest, size: int) -> None: ...

    def hold(self, digest: Digest) -> None: ...

    def let_go(self, digest: Digest) -> None: ...

    async def taken(self) -> tuple[int, int]: ...


class CacheRoom:
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
        slices: Slices | None = None,
    ) -> None:
        self._reactor = reactor
        self._slices = slices or Slices(reactor)
        self._layout = layout
        self._blobs = blobs
        self._inactive = inactive
        self._clock = clock
        self._reserved: set[Digest] = set()
        self.usage = Usage(limit)

    def service(self) -> TimerService:
        """Return the service that maintains the cache; its first round is at start."""
        timer = TimerService(  # type: ignore[no-untyped-call]
            MAINTENANCE, lambda: spawn(self.maintain(), "the cache's maintenance")
        )
        timer.clock = self._reactor
        return timer

    async def maintain(self) -> None:
        """Count what the disk holds; remove what is over the limit, was not used for too long, or was abandoned."""
        recount = self.usage.recount()
        try:
            await self._slices.run(self._walk(recount))
            self.usage.adopt(recount)
        finally:
            self.usage.give_up()
        await self._slices.run(recount.emptying())
        while gone := self.usage.expire(self._inactive, self._clock()):
            await self._remove(gone)

    async def reserve(self, digest: Digest, size: int, present: int) -> bool:
        """Make room for a blob of `size` bytes, of which `present` are on the disk already, if that can be.

        For a blob whose size nobody tells it is called again as that grows. `release` has to follow.
        """
        self.usage.remove(digest)  # what was left of it from before is part of it
        try:
            chosen = self.usage.make_room(size)
        except DoesNotFit:
            return False
        self.usage.add(digest, size, self._clock())
        if digest not in self._reserved:
            self._reserved.add(digest)
            self.usage.pin(digest)
        await self._remove(chosen)
        return await self._fits_on_disk(size - present)

    def release(self, digest: Digest) -> None:
        """End what `reserve` began, if it did: from now on what is on the disk counts, and may go."""
        if digest not in self._reserved:
            return
        self._reserved.remove(digest)
        self.usage.unpin(digest)
        if not self._blobs.exists(digest):
            self.usage.remove(digest)
            left = _entry(self._layout, digest)
            if left is not None:
                self._add(digest, left.size)

    def note_use(self, digest: Digest) -> None:
        """Note that a content is used now."""
        self.usage.touch(digest, self._clock())

    def hold(self, digest: Digest) -> None:
        """Note that a content is used now and must not go before `let_go`."""
        self.note_use(digest)
        self.usage.pin(digest)

    def let_go(self, digest: Digest) -> None:
        """End a `hold`."""
        self.usage.unpin(digest)

    async def keep(self, ingest: Ingest) -> None:
        """Publish a blob that is complete. Raises OSError."""
        size = ingest.size
        await in_thread(self._reactor, ingest.publish, self._blobs)
        await self.count(ingest.digest, size)

    async def count(self, digest: Digest, size: int) -> None:
        """Count a content that was written, and make others go where it is one too many."""
        self._add(digest, size)
        self.usage.pin(digest)
        try:
            with suppress(DoesNotFit):
                await self._remove(self.usage.make_room(0))
        finally:
            self.usage.unpin(digest)

    async def taken(self) -> tuple[int, int]:
        """Return how many bytes contents take, and how many they may."""
        return self.usage.total, self.usage.limit

    async def purge(self, digests: Iterable[Digest]) -> None:
        """Remove contents, whoever may use them; who reads one goes on reading."""
        purged = list(digests)
        for digest in purged:
            self.usage.remove(digest)
        await self._remove(purged)

    def _add(self, digest: Digest, size: int) -> None:
        self.usage.add(digest, size, self._clock())

    async def _fits_on_disk(self, wanted: int) -> bool:
        """Say whether the disk has `wanted` bytes, after making others go for it where it has not."""
        missing = wanted + _RESERVE - await in_thread(self._reactor, self._free)
        if missing > 0:
            # As if the limit were that much nearer: the least recently used go first here too.
            try:
                await self._remove(self.usage.make_room(self.usage.limit - self.usage.total + missing))
            except DoesNotFit:
                return False
        return True

    def _free(self) -> int:
        status = os.statvfs(self._layout.root)
        return status.f_bavail * status.f_frsize

    async def _remove(self, digests: list[Digest]) -> None:
        if digests:
            log.info("{count} contents leave the cache", count=len(digests))
            await in_thread(self._reactor, self._drop, digests)

    def _drop(self, digests: list[Digest]) -> None:
        for digest in digests:
            # What there is of one that did not come whole goes first: while there is a content nobody fetches it.
            if _entry(self._layout, digest) is not None:
                self._discard(digest)
            try:
                self._blobs.remove(digest)
            except OSError as error:
                _complain(digest, error)

    def _discard(self, digest: Digest) -> None:
        try:
            ingest = Ingest.open(self._layout, digest)
            if ingest is not None:
                try:
                    ingest.discard()
                finally:
                    ingest.release()
        except OSError as error:
            _complain(digest, error)

    def _walk(self, recount: Recount) -> Iterator[None]:
        for digest in stale_ingests(self._layout, self._clock() - _ABANDONED):
            self._discard(digest)
            yield None
        for digest in stale_ingests(self._layout, inf):
            left = _entry(self._layout, digest)
            if left is not None:
                recount.add(left)
            yield None
        for entry in self._blobs.walk():
            recount.add(entry)
            yield None
        yield from recount.order()


def _complain(digest: Digest, error: OSError) -> None:
    log.error("{digest} cannot be removed: {why}", digest=str(digest), why=error.strerror)


def _entry(layout: Layout, digest: Digest) -> Entry | None:
    """Return what there is of a blob that is, or was, under way."""
    try:
        status = os.stat(layout.ingest(digest))
    except FileNotFoundError:
        return None
    return Entry(digest, status.st_size, status.st_mtime)
