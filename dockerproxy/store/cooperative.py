"""A long walk of a store beside requests: it runs in one thread, which sleeps as long as it computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

from attrs import Factory, field, frozen

from dockerproxy.concurrency import in_thread
from dockerproxy.store.progress import Stopped

_SLICE = 0.001  # seconds of processor time between two pauses, and of each pause


@frozen
class CooperativeThread:
    """Runs work in a thread that pauses for a millisecond after each millisecond of processor time.

    Python runs one thread at a time, and makes a computing thread release the interpreter only every 5 ms
    (`sys.getswitchinterval`). A request needs the interpreter many times, so beside a thread that sorts or parses it
    would wait for tens of milliseconds: 45 to 81 beside the rescan of 100,000 blobs, 9 to 18 with the pauses. Reading
    the disk delays nobody.

    This bounds the delay of a request only if each step is short. A step must handle a bounded number of items,
    however large the store is.
    """

    reactor: Any
    _clock: Callable[[], float] = field(default=time.thread_time, kw_only=True)
    _stopping: Event = field(factory=Event, init=False)
    _sleep: Callable[[float], object] = field(
        default=Factory(lambda thread: thread._stopping.wait, takes_self=True), kw_only=True
    )

    async def run(self, steps: Iterator[None]) -> None:
        """Exhaust `steps` in a thread. Each step may block briefly.

        Raise `Stopped` after the current step if `stop` was called.
        """
        await in_thread(self.reactor, self._exhaust, steps)

    def stop(self) -> None:
        """End all runs after their current steps, because the daemon stops."""
        self._stopping.set()

    def _exhaust(self, steps: Iterator[None]) -> None:
        pause_at = self._clock() + _SLICE
        for _ in steps:
            if self._stopping.is_set():
                raise Stopped
            if self._clock() >= pause_at:
                self._sleep(_SLICE)
                pause_at = self._clock() + _SLICE
