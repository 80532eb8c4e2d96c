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

Pause = Callable[[], Awaitable[None]]

Turn = Callable[[], AbstractAsyncContextManager[Any]]

_MOST_FOUND = 128
"""So many things are handed to the reactor's thread in one turn: 1 to 2 ms, where each becomes a line of JSON."""


_HELD = 0.002
"""Seconds at most for which a slice holds a turn that requests wait for."""


def _ignore(*arguments: object) -> None:
    pass


async def _at_once() -> None:
    pass


def burden() -> float:
    """Return how long this thread was in others' way, in seconds: it computed, or it waited for the disk, which counts
    a tenth of that."""
    return 0.9 * time.thread_time() + 0.1 * time.monotonic()


@frozen
class Watch(Generic[T]):
    """Who is told how long work goes on, in the reactor's thread.

    `progress` gets the name of a phase, how much of it is done, and of how much (None where nobody knows yet); `found`
    gets each thing that the work came upon. `ready` is waited for before the work goes on: a listener that cannot keep
    up holds it.
    """

    progress: Callable[[str, int, int | None], object] = _ignore
    found: Callable[[T], object] = _ignore
    ready: Callable[[], Awaitable[None]] = _at_once

    def of(self, phase: str, done: Callable[[], int], total: Callable[[], int | None] = lambda: None) -> Pause:
        """Return what tells of `phase` after each slice of it."""

        async def tell() -> None:
            self.progress(phase, done(), total())
            await self.ready()

        return tell


@frozen
class Slices:
    """How work is cut.

    Python runs one thread at a time, and one that computes is asked to let go only every 5 ms
    (`sys.getswitchinterval`), so a request beside it crawls. Hence the work computes for `length` seconds at most (or
    waits for the disk ten times as long, which holds nobody up), and rests for `pause` seconds, in which requests have
    the machine to themselves. This bounds what requests wait as long as a step is short: it looks at a bounded number
    of things, however many there are.
    """

    reactor: Any
    length: float = 0.01
    pause: float = 0.005
    _clock: Callable[[], float] = field(default=burden, kw_only=True)

    async def run(
        self,
        steps: Iterator[T | None],
        use: Callable[[T], object] = _ignore,
        *,
        after_slice: Pause = _at_once,
        turn: Turn | None = None,
    ) -> None:
        """Take `steps`, each of which blocks for a moment, in a thread, until there are no more.

        What a step comes upon (not None) is `use`d in the reactor's thread, after the slice. `turn` is held during each
        slice, which is the shorter for it, and not in between. A cancelled run ends with the slice under way, and
        closes `steps` where that is a generator.
        """
        length = self.length if turn is None else min(self.length, _HELD)
        try:
            more = True
            while more:
                async with nullcontext() if turn is None else turn():
                    found, more = await self._slice(steps, length)
                for thing in found:
                    use(thing)
                await after_slice()
                if more:
                    await deferLater(self.reactor, self.pause)
        except Exception:
            await in_thread(self.reactor, _close, steps)
            raise

    async def run_beside(
        self,
        lanes: Iterable[Iterator[T | None]],
        use: Callable[[T], object] = _ignore,
        *,
        after_slice: Pause = _at_once,
    ) -> None:
        """Take the steps of several iterators, each in its own thread: disks do several things at a time.

        Where one goes wrong, the others are cancelled, and it is raised when all of them have ended.
        """
        runs = [Deferred.fromCoroutine(self.run(lane, use, after_slice=after_slice)) for lane in lanes]
        failures: list[Failure] = []

        def failed(failure: Failure) -> None:
            failures.append(failure)
            for run in runs:
                run.cancel()

        for run in runs:
            run.addErrback(failed)
        await DeferredList(runs)
        if failures:
            failures[0].raiseException()

    async def _slice(self, steps: Iterator[T | None], length: float) -> tuple[list[T], bool]:
        waiter: Deferred[Any] = Deferred()
        under_way = Deferred.fromCoroutine(in_thread(self.reactor, self._advance, steps, length))
        under_way.addBoth(lambda result: None if waiter.called else waiter.callback(result))
        try:
            result: tuple[list[T], bool] = await waiter
        except CancelledError:
            # A thread cannot be stopped. It is waited for: what it works on is the caller's again after this.
            ended: Deferred[None] = Deferred()
            under_way.addBoth(lambda _: ended.callback(None))
            await ended
            raise
        return result

    def _advance(self, steps: Iterator[T | None], length: float) -> tuple[list[T], bool]:
        end = self._clock() + length
        found: list[T] = []
        for thing in steps:
            if thing is not None:
                found.append(thing)
            if len(found) == _MOST_FOUND or self._clock() >= end:
                return found, True
        return found, False


def _close(steps: Iterator[Any]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()
