"""What the first process keeps for all, as a worker uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dockerproxy.concurrency import in_thread
from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest
from dockerproxy.workers.rpc import RPC, RemoteError

_USE_REPORT_INTERVAL = 5.0  # seconds in which uses of contents are collected before they are told
_MAX_USES_PER_REPORT = 1000  # uses in one message


class RemoteCacheSpace:
    """The cache's room, which the first process keeps (`CacheRoom`)."""

    def __init__(self, reactor: Any, rpc: RPC, blobs: Blobs) -> None:
        self._reactor = reactor
        self._rpc = rpc
        self._blobs = blobs
        self._unreported_uses: set[Digest] = set()

    async def reserve(self, digest: Digest, size: int, existing_size: int) -> bool:
        """Make room for a blob; see `CacheRoom`."""
        try:
            return bool(await self._rpc.call("reserve", str(digest), size, existing_size))
        except RemoteError:
            return False  # its clients get it all the same

    def release(self, digest: Digest) -> None:
        """End what `reserve` began."""
        self._rpc.notify("release", str(digest))

    async def commit(self, ingest: Ingest) -> None:
        """Publish a blob that is complete. Raises OSError."""
        size = ingest.size
        await in_thread(self._reactor, ingest.commit, self._blobs)
        await self.record(ingest.digest, size)

    async def record(self, digest: Digest, size: int) -> None:
        """Count a content that was written."""
        self._rpc.notify("record", str(digest), size)

    def pin(self, digest: Digest) -> None:
        """Note that a content is used. It may go for all that: who has it open goes on reading."""
        if not self._unreported_uses:
            self._reactor.callLater(_USE_REPORT_INTERVAL, self._report_uses)
        self._unreported_uses.add(digest)
        if len(self._unreported_uses) >= _MAX_USES_PER_REPORT:
            self._report_uses()

    def unpin(self, digest: Digest) -> None:
        """End a `hold`."""

    async def usage(self) -> tuple[int, int]:
        """Return how many bytes contents take, and how many they may. Raises `Elsewhere`."""
        used, limit = await self._rpc.call("usage")
        return int(used), int(limit)

    def _report_uses(self) -> None:
        digests, self._unreported_uses = self._unreported_uses, set()
        if digests:
            self._rpc.notify("mark_used", [str(digest) for digest in digests])


class RemoteKeyedLock:
    """Turns that the first process gives (`Turns`)."""

    def __init__(self, rpc: RPC) -> None:
        self._rpc = rpc
        self._last_lock_id = 0

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[bool]:
        """Wait for one's turn, and have it for the length of the block; the value says whether one had to wait."""
        self._last_lock_id += 1
        lock_id = self._last_lock_id
        try:
            yield bool(await self._rpc.call("lock", key, lock_id))
        finally:
            self._rpc.notify("unlock", lock_id)  # also of who did not wait for it
