"""What the first process keeps for all, as a worker uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from dockerproxy.oci.names import Digest
from dockerproxy.store.blobs import Blobs
from dockerproxy.store.ingest import Ingest
from dockerproxy.tasks import in_thread
from dockerproxy.workers.calls import Calls, Elsewhere

_TOLD_EVERY = 5.0  # seconds in which uses of contents are collected before they are told
_MOST_TOLD = 1000  # uses in one message


class RoomElsewhere:
    """The cache's room, which the first process keeps (`CacheRoom`)."""

    def __init__(self, reactor: Any, calls: Calls, blobs: Blobs) -> None:
        self._reactor = reactor
        self._calls = calls
        self._blobs = blobs
        self._used: set[Digest] = set()

    async def reserve(self, digest: Digest, size: int, present: int) -> bool:
        """Make room for a blob; see `CacheRoom`."""
        try:
            return bool(await self._calls.ask("reserve", str(digest), size, present))
        except Elsewhere:
            return False  # its clients get it all the same

    def release(self, digest: Digest) -> None:
        """End what `reserve` began."""
        self._calls.tell("release", str(digest))

    async def keep(self, ingest: Ingest) -> None:
        """Publish a blob that is complete. Raises OSError."""
        size = ingest.size
        await in_thread(self._reactor, ingest.publish, self._blobs)
        await self.count(ingest.digest, size)

    async def count(self, digest: Digest, size: int) -> None:
        """Count a content that was written."""
        self._calls.tell("count", str(digest), size)

    def hold(self, digest: Digest) -> None:
        """Note that a content is used. It may go for all that: who has it open goes on reading."""
        if not self._used:
            self._reactor.callLater(_TOLD_EVERY, self._tell)
        self._used.add(digest)
        if len(self._used) >= _MOST_TOLD:
            self._tell()

    def let_go(self, digest: Digest) -> None:
        """End a `hold`."""

    async def taken(self) -> tuple[int, int]:
        """Return how many bytes contents take, and how many they may. Raises `Elsewhere`."""
        held, limit = await self._calls.ask("taken")
        return int(held), int(limit)

    def _tell(self) -> None:
        used, self._used = self._used, set()
        if used:
            self._calls.tell("used", [str(digest) for digest in used])


class TurnsElsewhere:
    """Turns that the first process gives (`Turns`)."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._count = 0

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[bool]:
        """Wait for one's turn, and have it for the length of the block; the value says whether one had to wait."""
        self._count += 1
        number = self._count
        try:
            yield bool(await self._calls.ask("turn", key, number))
        finally:
            self._calls.tell("turn_ended", number)  # also of who did not wait for it
