"""Long work beside requests: a slice of it in a thread, a pause, the next slice."""

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
"""So many things are handed to the reactor's thread in one turn: 1 to 2 ms, where each becomes a line of JSON."""


_MAX_LOCK_HOLD = 0.002
"""Seconds at most for which a slice holds a turn that requests wait for."""


def _noop(*arguments: object) -> None:
    pass


async def _async_noop() -> None:
    pass


def thread_cost() -> float:
    """Return how long this thread was in others' way, in seconds: it computed, or it waited for the disk, which counts
    a tenth of that."""
    return 0.9 * time.thread_time() + 0.1 * time.monotonic()


@frozen
class Progress(Generic[T]):
    """Who is told how long work goes on, in the reactor's thread.

    `progress` gets the name of a phase, how much of it is done, and of how much (None where nobody knows yet); `found`
    gets each thing that the work came upon. `ready` is waited for before the work goes on: a listener that cannot keep
    up holds it.
    """

    report: Callable[[str, int, int | None], object] = _noop
    emit: Callable[[T], object] = _noop
    drain: Callable[[], Awaitable[None]] = _async_noop

    def reporter(
        self, phase: str, done: Callable[[], int], total: Callable[[], int | None] = lambda: None
    ) -> AsyncHook:
        """Return what tells of `phase` after each slice of it."""

        async def after_slice() -> None:
            self.report(phase, done(), total())
            await self.drain()

        return after_slice


@frozen
class CooperativeThread:
    """How work is cut.

    Python runs one thread at a time, and one that computes is asked to let go only every 5 ms
    (`sys.getswitchinterval`), so a request beside it crawls. Hence the work computes for `length` seconds at most (or
    waits for the disk ten times as long, which holds nobody up), and rests for `pause` seconds, in which requests have
    the machine to themselves. This bounds what requests wait as long as a step is short: it looks at a bounded number
    of things, however many there are.
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
        """Take `steps`, each of which blocks for a moment, in a thread, until there are no more.

        What a step comes upon (not None) is `use`d in the reactor's thread, after the slice. `turn` is held during each
        slice, which is the shorter for it, and not in between. A cancelled run ends with the slice under way, and
        closes `steps` where that is a generator.
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
        """Take the steps of several iterators, each in its own thread: disks do several things at a time.

        Where one goes wrong, the others are cancelled, and it is raised when all of them have ended.
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
            # A thread cannot be stopped. It is waited for: what it works on is the caller's again after this.
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
