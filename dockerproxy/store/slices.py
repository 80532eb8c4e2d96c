"""Long work beside requests: a slice of it in a thread, a pause, the next slice."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Generic, TypeVar

from attrs import field, frozen
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater

from dockerproxy.tasks import in_thread

T = TypeVar("T")

Pause = Callable[[], Awaitable[None]]


def _ignore(*arguments: object) -> None:
    pass


async def _at_once() -> None:
    pass


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
    (`sys.getswitchinterval`), so a request beside it crawls. Hence the work runs for `length` seconds at most, and
    rests for `pause` seconds, in which requests have the machine to themselves.
    """

    reactor: Any
    length: float = 0.01
    pause: float = 0.005
    _clock: Callable[[], float] = field(default=time.monotonic, kw_only=True)

    async def run(
        self,
        steps: Iterator[T | None],
        use: Callable[[T], object] = _ignore,
        *,
        after_slice: Pause = _at_once,
    ) -> None:
        """Take `steps`, each of which blocks for a moment, in a thread, until there are no more.

        A step that comes upon something (not None) ends the slice, and `use` is called with it in the reactor's thread.
        A cancelled run ends with the slice under way, and closes `steps` where that is a generator.
        """
        try:
            more = True
            while more:
                found, more = await self._slice(steps)
                if found is not None:
                    use(found)
                await after_slice()
                if more:
                    await deferLater(self.reactor, self.pause)
        except Exception:
            await in_thread(self.reactor, _close, steps)
            raise

    async def _slice(self, steps: Iterator[T | None]) -> tuple[T | None, bool]:
        waiter: Deferred[Any] = Deferred()
        under_way = Deferred.fromCoroutine(in_thread(self.reactor, self._advance, steps))
        under_way.addBoth(lambda result: None if waiter.called else waiter.callback(result))
        try:
            result: tuple[T | None, bool] = await waiter
        except CancelledError:
            # A thread cannot be stopped. It is waited for: what it works on is the caller's again after this.
            ended: Deferred[None] = Deferred()
            under_way.addBoth(lambda _: ended.callback(None))
            await ended
            raise
        return result

    def _advance(self, steps: Iterator[T | None]) -> tuple[T | None, bool]:
        end = self._clock() + self.length
        for found in steps:
            if found is not None or self._clock() >= end:
                return found, True
        return None, False


def _close(steps: Iterator[Any]) -> None:
    close = getattr(steps, "close", None)
    if close is not None:
        close()
