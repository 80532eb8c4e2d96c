"""A limit on how long nothing may happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Calls `expired` once `seconds` have passed since the last `start` or `touch`, unless stopped.

    A touch costs a look at the clock: the reactor's timer is left alone and put off when it goes off too early.
    """

    def __init__(self, clock: Any, seconds: float, expired: Callable[[], None]) -> None:
        self._clock = clock
        self._seconds = seconds
        self._expired = expired
        self._since = 0.0
        self._call: Any = None
        self._running = False

    def start(self) -> None:
        """Begin to count, anew where it counts already."""
        self._running = True
        self._since = self._clock.seconds()
        if self._call is None:
            self._call = self._clock.callLater(self._seconds, self._look)

    def touch(self) -> None:
        """Note that something happened."""
        self._since = self._clock.seconds()

    def pause(self) -> None:
        """Count no more until the next start; the timer stays, for a pause is often short."""
        self._running = False

    def stop(self) -> None:
        """Count no more, and leave nothing behind."""
        self._running = False
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def _look(self) -> None:
        self._call = None
        if not self._running:
            return
        left = self._since + self._seconds - self._clock.seconds()
        if left > 0:
            self._call = self._clock.callLater(left, self._look)
        else:
            self._running = False
            self._expired()
