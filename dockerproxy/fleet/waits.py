"""The content that this daemon waits for at other members, so that no two members wait for each other.

A member that asks this one must not wait for a download that this one gets from a member, perhaps from the asking one
itself. Workers learn of each other's waits by records.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.cache.best_effort import try_put, try_remove
from dockerproxy.errors import LoopDetected
from dockerproxy.fleet.hop import Hop, HopKind
from dockerproxy.store.records import Records

LOOK_INTERVAL = 0.25
"""Seconds between two looks whether a request waits in a circle."""

PATIENCE = 1.0
"""Seconds for which a member that asks may wait for content that this one gets from another; it may be here by then."""

_RELAY_PATIENCE = 5.0
_RECORD = "via"
_MAX_AGE = 3600.0  # seconds; an older record is of a process that was killed

T = TypeVar("T")


class Waits:
    """The keys for which this daemon waits, with the member. `records` is None if there are no other processes.

    `now` returns seconds of the reactor's clock, which all processes of a machine share.
    """

    def __init__(self, clock: Any, records: Records | None) -> None:
        self._clock = clock
        self._records = records
        self._members: dict[str, list[str]] = {}

    def begin(self, key: str, member: str) -> Callable[[], None]:
        """Note that this daemon waits for `key` at `member`. Return the function that ends this."""
        members = self._members.setdefault(key, [])
        members.append(member)
        self._publish(key)
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                members.remove(member)
                if not members:
                    self._members.pop(key, None)
                self._publish(key)

        return end

    def member(self, key: str) -> str | None:
        """Return a member at which this daemon waits for `key`; None if there is none."""
        members = self._members.get(key)
        if members:
            return members[-1]
        if self._records is None:
            return None
        record = self._records.get(_RECORD, key) or {}
        member, since = record.get("member"), record.get("since")
        if not isinstance(member, str) or not isinstance(since, float):
            return None
        return member if 0 <= self._clock.seconds() - since < _MAX_AGE else None

    async def run(self, key: str, hop: Hop, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which serves `key` to a member.

        Raise `LoopDetected` if it waits for the asking member, or for too long for another one.
        """
        started, patience = self._clock.seconds(), _RELAY_PATIENCE if hop.kind is HopKind.RELAY else PATIENCE
        task: Deferred[T] = Deferred.fromCoroutine(work)
        circle: str | None = None
        call: Any = None

        def look() -> None:
            nonlocal circle, call
            if task.called:
                return
            member = self.member(key)
            if member == hop.sender or (member is not None and self._clock.seconds() - started >= patience):
                circle = member
                task.cancel()
            else:
                call = self._clock.callLater(LOOK_INTERVAL, look)

        look()
        try:
            return await task
        except CancelledError:
            if circle is None:
                raise
            raise LoopDetected(f"this member waits for {circle} itself to get {key}") from None
        finally:
            if call is not None and call.active():
                call.cancel()

    def _publish(self, key: str) -> None:
        if self._records is None:
            return
        members = self._members.get(key)
        if members:
            try_put(self._records, {"member": members[-1], "since": float(self._clock.seconds())}, _RECORD, key)
        else:
            try_remove(self._records, _RECORD, key)
