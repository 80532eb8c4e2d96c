"""The set of transfers in progress, which the shutdown waits for."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

log = Logger()


@frozen(eq=False)
class TransferHandle:
    """Identifies one transfer. Handles compare by identity."""

    abort: Callable[[], None] = field(repr=False)


@define
class Transfers:
    """The transfers in progress."""

    # A dict, because its order lets `drain` abort the oldest first.
    _live: dict[TransferHandle, None] = field(init=False, factory=dict)
    _empty_waiters: list[Deferred[None]] = field(init=False, factory=list)

    def __len__(self) -> int:
        """Return the number of transfers in progress."""
        return len(self._live)

    def add(self, abort: Callable[[], None]) -> TransferHandle:
        """Register a transfer that `abort` ends at once. Pass the returned handle to `remove` when it has ended."""
        handle = TransferHandle(abort)
        self._live[handle] = None
        return handle

    def remove(self, handle: TransferHandle) -> None:
        """Remove a transfer that has ended. Removing it twice has no effect."""
        self._live.pop(handle, None)
        # One by one, because a callback may add a transfer or cancel another waiter.
        while self._empty_waiters and not self._live:
            self._empty_waiters.pop(0).callback(None)

    def when_empty(self) -> Deferred[None]:
        """Return a Deferred that fires when no transfer is left, at once if there is none. It may be cancelled."""
        deferred: Deferred[None] = Deferred(self._empty_waiters.remove)
        if self._live:
            self._empty_waiters.append(deferred)
        else:
            deferred.callback(None)
        return deferred

    async def drain(self, clock: IReactorTime, grace: float) -> int:
        """Wait up to `grace` seconds for all transfers to end, abort the rest, and return how many were aborted."""
        try:
            await self.when_empty().addTimeout(grace, clock)
        except TimeoutError:
            return self._abort_all()
        return 0

    def _abort_all(self) -> int:
        aborted = 0
        for handle in list(self._live):
            if handle not in self._live:  # a previous abort ended this one, too
                continue
            aborted += 1
            try:
                handle.abort()
            except Exception:
                log.failure("could not abort a transfer")
        return aborted
