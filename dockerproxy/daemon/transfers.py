"""The transfers under way, so that a stopping daemon can let them end."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

log = Logger()


@frozen(eq=False)
class TransferHandle:
    """Stands for one live thing; equal to itself only."""

    abort: Callable[[], None] = field(repr=False)


@define
class Transfers:
    """The set of things that are live now."""

    _live: dict[TransferHandle, None] = field(
        init=False, factory=dict
    )  # a dict, for its order: the oldest is aborted first
    _empty_waiters: list[Deferred[None]] = field(init=False, factory=list)

    def add(self, abort: Callable[[], None]) -> TransferHandle:
        """Take in a live thing that `abort` ends at once; give what is returned to `remove` when it has ended."""
        handle = TransferHandle(abort)
        self._live[handle] = None
        return handle

    def remove(self, handle: TransferHandle) -> None:
        """Forget a thing that has ended. Nothing happens if it is forgotten already."""
        self._live.pop(handle, None)
        # One by one: what waits may add something, or cancel another that waits.
        while self._empty_waiters and not self._live:
            self._empty_waiters.pop(0).callback(None)

    def when_empty(self) -> Deferred[None]:
        """Return a Deferred that fires when nothing is live: now, if nothing is. It may be cancelled."""
        deferred: Deferred[None] = Deferred(self._empty_waiters.remove)
        if self._live:
            self._empty_waiters.append(deferred)
        else:
            deferred.callback(None)
        return deferred

    async def drain(self, clock: IReactorTime, grace: float) -> int:
        """Wait up to `grace` seconds until nothing is live, then abort what still is; return how many that were."""
        try:
            await self.when_empty().addTimeout(grace, clock)
        except TimeoutError:
            return self._abort_all()
        return 0

    def _abort_all(self) -> int:
        aborted = 0
        for handle in list(self._live):
            if handle not in self._live:  # an earlier one's abort ended it
                continue
            aborted += 1
            try:
                handle.abort()
            except Exception:
                log.failure("A transfer could not be aborted")
        return aborted
