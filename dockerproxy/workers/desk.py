"""What the first process does for its workers: it keeps the cache's room, and gives turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred

from dockerproxy.cache.room import CacheRoom
from dockerproxy.oci.names import Digest
from dockerproxy.store.ingest import Ingest
from dockerproxy.tasks import Turns, spawn


@define
class Reservations:
    """Who has reserved room for which blob; the first process's own downloads reserve it here as well.

    The ingest's lock goes from one process to the next before the word of it gets here. So what a process releases that
    another has reserved by now stays.
    """

    room: CacheRoom
    _owners: dict[Digest, object] = field(factory=dict, init=False)

    async def reserve(self, owner: object, digest: Digest, size: int, present: int) -> bool:
        """Reserve room, as `CacheRoom.reserve`."""
        self._owners[digest] = owner
        return await self.room.reserve(digest, size, present)

    def release(self, owner: object, digest: Digest) -> None:
        """Release what `owner` reserved, unless another has by now."""
        if self._owners.get(digest) is owner:
            del self._owners[digest]
            self.room.release(digest)

    def release_all(self, owner: object) -> None:
        """Release all that a process that is gone had reserved."""
        for digest in [digest for digest, found in self._owners.items() if found is owner]:
            self.release(owner, digest)


@define
class FirstRoom:
    """The cache's room for the downloads of the first process itself."""

    _reservations: Reservations

    async def reserve(self, digest: Digest, size: int, present: int) -> bool:
        return await self._reservations.reserve(self, digest, size, present)

    def release(self, digest: Digest) -> None:
        self._reservations.release(self, digest)

    async def keep(self, ingest: Ingest) -> None:
        await self._reservations.room.keep(ingest)

    async def count(self, digest: Digest, size: int) -> None:
        await self._reservations.room.count(digest, size)

    def hold(self, digest: Digest) -> None:
        self._reservations.room.hold(digest)

    def let_go(self, digest: Digest) -> None:
        self._reservations.room.let_go(digest)

    async def taken(self) -> tuple[int, int]:
        return await self._reservations.room.taken()


@define(eq=False)
class Desk:
    """What one worker may ask."""

    _reservations: Reservations
    _turns: Turns
    _waiting: set[int] = field(factory=set, init=False)
    _held: dict[int, Deferred[None]] = field(factory=dict, init=False)

    @property
    def answers(self) -> dict[str, Callable[..., Any]]:
        """The questions, as `Calls` takes them."""
        return {
            "reserve": self._reserve,
            "release": lambda digest: self._reservations.release(self, Digest.parse(digest)),
            "count": lambda digest, size: self._reservations.room.count(Digest.parse(digest), size),
            "used": self._used,
            "taken": self._reservations.room.taken,
            "turn": self._turn,
            "turn_ended": self._turn_ended,
        }

    def close(self) -> None:
        """End what a worker that is gone had here."""
        self._waiting.clear()
        self._reservations.release_all(self)
        for number in list(self._held):
            self._turn_ended(number)

    async def _reserve(self, digest: str, size: int, present: int) -> bool:
        return await self._reservations.reserve(self, Digest.parse(digest), size, present)

    def _used(self, digests: list[str]) -> None:
        for digest in digests:
            self._reservations.room.note_use(Digest.parse(digest))

    def _turn(self, key: str, number: int) -> Deferred[bool]:
        """Give the turn that the worker calls `number`; it ends by `turn_ended`, which may come before it begins."""
        began: Deferred[bool] = Deferred()
        self._waiting.add(number)
        spawn(self._have_turn(key, number, began), f"the turn in {key}")
        return began

    async def _have_turn(self, key: str, number: int, began: Deferred[bool]) -> None:
        async with self._turns.of(key) as waited:
            if number not in self._waiting:
                return
            self._waiting.remove(number)
            ended = self._held[number] = Deferred()
            began.callback(waited)
            await ended

    def _turn_ended(self, number: int) -> None:
        self._waiting.discard(number)
        ended = self._held.pop(number, None)
        if ended is not None:
            ended.callback(None)
