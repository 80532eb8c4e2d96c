"""Long-running work beside requests: it runs in a thread in short slices with a pause after each."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Generic, TypeVar

from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from dockerproxy.concurrency import in_thread

T = TypeVar("T")

AsyncHook = Callable[[], Awaitable[None]]

LockFactory = Callable[[], AbstractAsyncContextManager[Any]]

_MAX_RESULTS = 128
"""Results passed to the reactor's thread per slice. This takes 1 to 2 ms if each becomes a line of JSON."""


_MAX_LOCK_HOLD = 0.002
"""Seconds that a slice may hold a lock, because requests wait for it."""


def _noop(*arguments: object) -> None:
    pass


async def _async_noop() -> None:
    pass


def thread_cost() -> float:
    """Return the seconds this thread cost others: CPU time in full, time blocked on I/O at a tenth."""
    return 0.9 * time.thread_time() + 0.1 * time.monotonic()


@frozen
class Progress(Generic[T]):
    """Callbacks for the progress and the results of some work. They run in the reactor's thread.

    `report` gets the name of a phase, the amount done, and the total (None if it is not known yet). `emit` gets each
    result. The work awaits `drain` before it continues, so a slow listener pauses it.
    """

    report: Callable[[str, int, int | None], object] = _noop
    emit: Callable[[T], object] = _noop
    drain: Callable[[], Awaitable[None]] = _async_noop

    def reporter(
        self, phase: str, done: Callable[[], int], total: Callable[[], int | None] = lambda: None
    ) -> AsyncHook:
        """Return an `after_slice` hook that reports the progress of `phase`."""

        async def after_slice() -> None:
            self.report(phase, done(), total())
            await self.drain()

        return after_slice


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

    async def run(
        self,
        steps: Iterator[T | None],
        consume: Callable[[T], object] = _noop,
        *,
        after_slice: AsyncHook = _async_noop,
        lock: LockFactory | None = None,
    ) -> None:
        """Exhaust `steps` in a thread. Each step may block briefly.

        After each slice, `consume` gets the step results that are not None, in the reactor's thread. `lock` is held
        during each slice, but not between slices; it makes the slices shorter. A cancelled run ends after the current
        slice, and closes `steps` if that is a generator.
        """
        length = self.slice_length if lock is None else min(self.slice_length, _MAX_LOCK_HOLD)
        try:
            has_more = True
            while has_more:
                async with nullcontext() if lock is None else lock():
                    results, has_more = await self._run_slice(steps, length)
                for item in results:
                    consume(item)
                await after_slice()
                if has_more:
                    await deferLater(self.reactor, self.pause)
        except Exception:
            await in_thread(self.reactor, _close, steps)
            raise

    async def run_parallel(
        self,
        iterators: Iterable[Iterator[T | None]],
        consume: Callable[[T], object] = _noop,
        *,
        after_slice: AsyncHook = _async_noop,
    ) -> None:
        """Exhaust several iterators, each in its own thread, because a disk serves several requests at a time.

        If one fails, cancel the others, wait until all have ended, and raise its error.
        """
        runs = [Deferred.fromCoroutine(self.run(steps, consume, after_slice=after_slice)) for steps in iterators]
        failures: list[Failure] = []

        def on_failure(failure: Failure) -> None:
            failures.append(failure)
            for run in runs:
                run.cancel()

        for run in runs:
            run.addErrback(on_failure)
        await DeferredList(runs)
        if failures:
            failures[0].raiseException()

    async def _run_slice(self, steps: Iterator[T | None], length: float) -> tuple[list[T], bool]:
        waiter: Deferred[Any] = Deferred()
        job = Deferred.fromCoroutine(in_thread(self.reactor, self._advance, steps, length))
        job.addBoth(lambda result: None if waiter.called else waiter.callback(result))
        try:
            result: tuple[list[T], bool] = await waiter
        except CancelledError:
            # A thread cannot be stopped. Wait for it, because the caller may reuse the data it works on.
            job_done: Deferred[None] = Deferred()
            job.addBoth(lambda _: job_done.callback(None))
            await job_done
            raise
        return result

    def _advance(self, steps: Iterator[T | None], length: float) -> tuple[list[T], bool]:
        deadline = self._clock() + length
        results: list[T] = []
        for item in steps:
            if item is not None:
                results.append(item)
            if len(results) == _MAX_RESULTS or self._clock() >= deadline:
                return results, True
        return results, False


def _close(steps: Iterator[Any]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()
