"""The room that the cache has: made for what comes, by what was not used for longest."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.application.internet import TimerService
from twisted.logger import Logger

from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest, stale_ingests
from dockerproxy.store.layout import Layout
from dockerproxy.store.usage import DoesNotFit, Usage
from dockerproxy.tasks import in_thread, spawn

MAINTENANCE = 600.0
"""Seconds between two looks at what is too old, and at what the disk really holds."""

_ABANDONED = 86400.0  # seconds after which a download that nobody took up is thrown away
_RESERVE = 16 * 1024 * 1024  # bytes left free on the disk: links, records and other programs need some

log = Logger()


class CacheRoom:
    """Keeps the cache within its limit. What is under way is reserved before it is written, and never chosen to go."""

    def __init__(
        self, reactor: Any, layout: Layout, blobs: Blobs, *, limit: int, inactive: float, clock: Callable[[], float]
    ) -> None:
        self._reactor = reactor
        self._layout = layout
        self._blobs = blobs
        self._inactive = inactive
        self._clock = clock
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
        entries = await in_thread(self._reactor, lambda: list(self._blobs.walk()))
        self.usage.load(entries)
        await self._remove(self.usage.expire(self._inactive, self._clock()))
        await in_thread(self._reactor, self._drop_abandoned)

    async def reserve(self, digest: Digest, size: int | None) -> bool:
        """Make room for a blob of `size` bytes (None: as many as come) that is about to be written, if that can be.

        A True is to be followed by `release`.
        """
        wanted = size or 0
        try:
            chosen = self.usage.make_room(wanted)
        except DoesNotFit:
            return False
        self.usage.add(digest, wanted, self._clock())
        self.usage.pin(digest)
        await self._remove(chosen)
        return size is None or await self._fits_on_disk(size)

    def release(self, digest: Digest) -> None:
        """End a reservation; what was not kept counts no longer."""
        with suppress(KeyError):
            self.usage.unpin(digest)
            if not self._blobs.exists(digest):
                self.usage.remove(digest)

    def hold(self, digest: Digest) -> None:
        """Note that a content is used now and must not go before `let_go`."""
        self.usage.touch(digest, self._clock())
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
        self.usage.add(digest, size, self._clock())
        self.usage.pin(digest)
        try:
            with suppress(DoesNotFit):
                await self._remove(self.usage.make_room(0))
        finally:
            self.usage.unpin(digest)

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
            await in_thread(self._reactor, lambda: [self._blobs.remove(digest) for digest in digests])

    def _drop_abandoned(self) -> None:
        for digest in stale_ingests(self._layout, self._clock() - _ABANDONED):
            ingest = Ingest.open(self._layout, digest)
            if ingest is not None:
                ingest.discard()
