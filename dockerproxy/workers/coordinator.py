"""The state that all processes share: the space of the cache, locks, and which logins are refused.

Every process sees it as a `Coordinator`. The main process owns the state, so its `LocalCoordinator` works directly. A
worker's `RemoteCoordinator` (`remote`) calls the methods of a `LocalCoordinator` that the main process has for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from attrs import define, field
from twisted.internet.defer import Deferred

from dockerproxy.cache.ended_logins import EndedLogins
from dockerproxy.cache.space import CacheSpace, CacheSpaceManager
from dockerproxy.concurrency import LocalKeyedLock, spawn
from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import IngestKey


class Coordinator(CacheSpace, Protocol):
    """The shared state as one process sees it: a `CacheSpace`, a `KeyedLock`, and reports to `EndedLogins`."""

    def hold(self, key: str) -> AbstractAsyncContextManager[bool]: ...

    def report_login(self, registry: str, setting: str, reason: str) -> None: ...


@define
class SharedState:
    """The shared state in the main process.

    `owners` maps each reserved download to the coordinator of its process. A process may take over an ingest before we
    learn that its previous writer released it. A release is therefore ignored if another process has reserved the same
    key since.
    """

    space: CacheSpaceManager
    ended_logins: EndedLogins
    locks: LocalKeyedLock = field(factory=LocalKeyedLock)
    owners: dict[IngestKey, LocalCoordinator] = field(factory=dict, init=False)


@define(eq=False)
class LocalCoordinator(Coordinator):
    """The coordinator of one process in the main process. `close` releases what the process holds."""

    _shared: SharedState
    _waiting_locks: set[int] = field(factory=set, init=False)
    _held_locks: dict[int, Deferred[None]] = field(factory=dict, init=False)

    # cache space

    async def reserve(self, key: IngestKey, size: int, expected_size: int, existing_size: int, client: str) -> str:
        self._shared.owners[key] = self
        return await self._shared.space.reserve(key, size, expected_size, existing_size, client)

    async def record_commit(self, key: IngestKey, size: int) -> None:
        await self._shared.space.record_commit(key, size)

    def release(self, key: IngestKey) -> None:
        """Release a reservation. Do nothing if another process has reserved the key since."""
        if self._shared.owners.get(key) is self:
            del self._shared.owners[key]
            self._shared.space.release(key)

    async def record(self, digest: Digest, size: int, client: str, registry: str) -> None:
        await self._shared.space.record(digest, size, client, registry)

    def touch(self, digest: Digest) -> None:
        self._shared.space.touch(digest)

    def touch_all(self, digests: list[Digest]) -> None:
        """Record that another process has used `digests`."""
        for digest in digests:
            self._shared.space.touch(digest)

    def record_files(self, count: int) -> None:
        self._shared.space.record_files(count)

    async def usage(self) -> tuple[int, int]:
        return await self._shared.space.usage()

    # locks

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[bool]:
        """Hold the lock of `key`; see `KeyedLock.hold`."""
        async with self._shared.locks.hold(key) as waited:
            yield waited

    def lock(self, key: str, lock_id: int) -> Deferred[bool]:
        """Acquire a lock for another process.

        That process releases it by `unlock` with the same `lock_id`. That also cancels a lock that is still waiting.
        """
        acquired: Deferred[bool] = Deferred()
        self._waiting_locks.add(lock_id)
        spawn(self._hold_until_unlocked(key, lock_id, acquired), f"locking {key} for a worker")
        return acquired

    def unlock(self, lock_id: int) -> None:
        """Release a lock, or give it up if it is still waiting."""
        self._waiting_locks.discard(lock_id)
        released = self._held_locks.pop(lock_id, None)
        if released is not None:
            released.callback(None)

    async def _hold_until_unlocked(self, key: str, lock_id: int, acquired: Deferred[bool]) -> None:
        async with self._shared.locks.hold(key) as waited:
            if lock_id not in self._waiting_locks:
                return
            self._waiting_locks.remove(lock_id)
            released = self._held_locks[lock_id] = Deferred()
            acquired.callback(waited)
            await released

    # logins

    def report_login(self, registry: str, setting: str, reason: str) -> None:
        """Record that a login is refused, or works again; see `EndedLogins.report`."""
        self._shared.ended_logins.report(registry, setting, reason)

    # the end

    def close(self) -> None:
        """Release the reservations and locks of a process that has exited."""
        self._waiting_locks.clear()
        for key in [key for key, owner in self._shared.owners.items() if owner is self]:
            self.release(key)
        for lock_id in list(self._held_locks):
            self.unlock(lock_id)


def _digests(texts: list[str]) -> list[Digest]:
    return [Digest.parse(text) for text in texts]


_ARGUMENT_PARSERS: Mapping[str, tuple[Callable[[Any], Any], ...]] = {
    "reserve": (IngestKey.parse, int, int, int, str),
    "record_commit": (IngestKey.parse, int),
    "release": (IngestKey.parse,),
    "record": (Digest.parse, int, str, str),
    "touch_all": (_digests,),
    "record_files": (int,),
    "usage": (),
    "lock": (str, int),
    "unlock": (int,),
    "report_login": (str, str, str),
}
"""The methods of `LocalCoordinator` that a worker calls by RPC, with the parsers of their arguments."""


def rpc_handlers(coordinator: LocalCoordinator) -> dict[str, Callable[..., Any]]:
    """Return the RPC handlers of a worker's coordinator."""

    def handler(name: str) -> Callable[..., Any]:
        method, parsers = getattr(coordinator, name), _ARGUMENT_PARSERS[name]
        return lambda *arguments: method(*(parse(value) for parse, value in zip(parsers, arguments, strict=True)))

    return {name: handler(name) for name in _ARGUMENT_PARSERS}
