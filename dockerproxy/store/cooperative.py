"""Long-running work beside requests: it runs in a thread in short slices with a pause after each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater

from dockerproxy.concurrency import in_thread

AsyncHook = Callable[[], Awaitable[None]]


async def _async_noop() -> None:
    pass


def thread_cost() -> float:
    """Return the seconds this thread cost others: CPU time in full, time blocked on I/O at a tenth."""
    return 0.9 * time.thread_time() + 0.1 * time.monotonic()


@frozen
class CooperativeThread:
    """Runs work in a thread, in slices that leave time for requests.

    Python runs one thread at a time, and makes a computing thread release the interpreter only every 5 ms
    (`sys.getswitchinterval`). A request beside such a thread would be very slow. A slice therefore computes for at most
    `slice_length` seconds, or waits ten times as long for the disk, which delays nobody. The run then pauses for
    `pause` seconds, in which requests have the processor to themselves.

    This bounds the delay of a request only if each step is short. A step must handle a bounded number of items,
    however large the store is.
    """

    reactor: Any
    slice_length: float = 0.01
    pause: float = 0.005
    _clock: Callable[[], float] = field(default=thread_cost, kw_only=True)

    async def run(self, steps: Iterator[None], *, after_slice: AsyncHook = _async_noop) -> None:
        """Exhaust `steps` in a thread. Each step may block briefly.

        `after_slice` is called after each slice, in the reactor's thread. A cancelled run ends after the current slice,
        and closes `steps` if that is a generator.
        """
        try:
            has_more = True
            while has_more:
                has_more = await self._run_slice(steps)
                await after_slice()
                if has_more:
                    await deferLater(self.reactor, self.pause)
        except Exception:
            await in_thread(self.reactor, _close, steps)
            raise

    async def _run_slice(self, steps: Iterator[None]) -> bool:
        waiter: Deferred[Any] = Deferred()
        job = Deferred.fromCoroutine(in_thread(self.reactor, self._advance, steps))
        job.addBoth(lambda result: None if waiter.called else waiter.callback(result))
        try:
            has_more: bool = await waiter
        except CancelledError:
            # A thread cannot be stopped. Wait for it, because the caller may reuse the data it works on.
            job_done: Deferred[None] = Deferred()
            job.addBoth(lambda _: job_done.callback(None))
            await job_done
            raise
        return has_more

    def _advance(self, steps: Iterator[None]) -> bool:
        deadline = self._clock() + self.slice_length
        return any(self._clock() >= deadline for _ in steps)


def _close(steps: Iterator[None]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()
