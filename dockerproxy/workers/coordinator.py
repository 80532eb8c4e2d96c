"""The main process's side of the state that all processes share: the space of the cache, and locks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred

from dockerproxy.cache.space import CacheSpace, CacheSpaceManager
from dockerproxy.concurrency import LocalKeyedLock, spawn
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import IngestKey


@define
class ReservationTable:
    """Maps each reserved download to its owner: a worker's session, or the main process.

    A process may take over an ingest before we learn that its previous writer released it. A release is therefore
    ignored if another process has reserved the same key since.
    """

    space: CacheSpaceManager
    _owners: dict[IngestKey, object] = field(factory=dict, init=False)

    async def reserve(self, owner: object, key: IngestKey, size: int, existing_size: int) -> bool:
        """Reserve space for `owner`; see `CacheSpaceManager.reserve`."""
        self._owners[key] = owner
        return await self.space.reserve(key, size, existing_size)

    def release(self, owner: object, key: IngestKey) -> None:
        """Release a reservation of `owner`. Do nothing if another process has reserved the key since."""
        if self._owners.get(key) is owner:
            del self._owners[key]
            self.space.release(key)

    def release_all(self, owner: object) -> None:
        """Release all reservations of a process that has exited."""
        for key in [key for key, holder in self._owners.items() if holder is owner]:
            self.release(owner, key)


@define
class LocalCacheSpace(CacheSpace):
    """The cache space as the downloads of the main process use it."""

    _reservations: ReservationTable

    async def reserve(self, key: IngestKey, size: int, existing_size: int) -> bool:
        return await self._reservations.reserve(self, key, size, existing_size)

    async def record_commit(self, key: IngestKey, size: int) -> None:
        await self._reservations.space.record_commit(key, size)

    def release(self, key: IngestKey) -> None:
        self._reservations.release(self, key)

    async def record(self, digest: Digest, size: int) -> None:
        await self._reservations.space.record(digest, size)

    def pin(self, digest: Digest) -> None:
        self._reservations.space.pin(digest)

    def unpin(self, digest: Digest) -> None:
        self._reservations.space.unpin(digest)

    def record_files(self, count: int) -> None:
        self._reservations.space.record_files(count)

    async def usage(self) -> tuple[int, int]:
        return await self._reservations.space.usage()


@define(eq=False)
class WorkerSession:
    """The server side of one worker's RPC connection."""

    _reservations: ReservationTable
    _locks: LocalKeyedLock
    _waiting_locks: set[int] = field(factory=set, init=False)
    _held_locks: dict[int, Deferred[None]] = field(factory=dict, init=False)

    @property
    def handlers(self) -> dict[str, Callable[..., Any]]:
        """The RPC methods that the worker may call."""
        return {
            "reserve": self._reserve,
            "record_commit": lambda key, size: self._reservations.space.record_commit(IngestKey.parse(key), size),
            "release": lambda key: self._reservations.release(self, IngestKey.parse(key)),
            "record": lambda digest, size: self._reservations.space.record(Digest.parse(digest), size),
            "mark_used": self._mark_used,
            "record_files": self._reservations.space.record_files,
            "usage": self._reservations.space.usage,
            "lock": self._lock,
            "unlock": self._unlock,
        }

    def close(self) -> None:
        """Release the reservations and locks of a worker that has exited."""
        self._waiting_locks.clear()
        self._reservations.release_all(self)
        for lock_id in list(self._held_locks):
            self._unlock(lock_id)

    async def _reserve(self, key: str, size: int, existing_size: int) -> bool:
        return await self._reservations.reserve(self, IngestKey.parse(key), size, existing_size)

    def _mark_used(self, digests: list[str]) -> None:
        for digest in digests:
            self._reservations.space.touch(Digest.parse(digest))

    def _lock(self, key: str, lock_id: int) -> Deferred[bool]:
        """Acquire a lock for the worker.

        The worker releases it by `unlock` with the same `lock_id`. That also cancels a lock that is still waiting.
        """
        acquired: Deferred[bool] = Deferred()
        self._waiting_locks.add(lock_id)
        spawn(self._hold_lock(key, lock_id, acquired), f"locking {key} for a worker")
        return acquired

    async def _hold_lock(self, key: str, lock_id: int, acquired: Deferred[bool]) -> None:
        async with self._locks.hold(key) as waited:
            if lock_id not in self._waiting_locks:
                return
            self._waiting_locks.remove(lock_id)
            released = self._held_locks[lock_id] = Deferred()
            acquired.callback(waited)
            await released

    def _unlock(self, lock_id: int) -> None:
        self._waiting_locks.discard(lock_id)
        released = self._held_locks.pop(lock_id, None)
        if released is not None:
            released.callback(None)
