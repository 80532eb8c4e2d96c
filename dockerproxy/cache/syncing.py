"""What is downloaded put on the disk while more of it comes: at the end, clients wait for that."""

from __future__ import annotations

import os
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock

from dockerproxy.concurrency import in_thread, spawn
from dockerproxy.store.ingest import Ingest

_FSYNC_THRESHOLD = 64 * 1024 * 1024  # bytes: 0.02 s for an NVMe disk


class BackgroundFsync:
    """Syncs one ingest again and again as it grows.

    `turn` is shared: only one file is synced at a time, or a slow disk would hold every thread that there is.
    """

    def __init__(self, reactor: Any, lock: DeferredLock) -> None:
        self._reactor = reactor
        self._lock = lock
        self._synced_size = 0
        self._running: Deferred[None] | None = None
        self._error: OSError | None = None

    def start_if_due(self, ingest: Ingest) -> None:
        """Have the disk take what is there, where that is much, and it is not busy with that already."""
        if ingest.size - self._synced_size >= _FSYNC_THRESHOLD and not self._lock.locked:
            self._synced_size = ingest.size
            self._running = spawn(self._sync(ingest.reader()), "to sync a download")

    async def finish(self, ingest: Ingest) -> None:
        """Have the disk take the rest. Raise the OSError that any of it met: the kernel tells each only once."""
        if self._running is not None:
            await self._running
        if self._error is not None:
            raise self._error
        await in_thread(self._reactor, _sync_and_close, ingest.reader())

    async def _sync(self, descriptor: int) -> None:
        async with self._lock:
            try:
                await in_thread(self._reactor, _sync_and_close, descriptor)
            except OSError as error:
                self._error = error


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
