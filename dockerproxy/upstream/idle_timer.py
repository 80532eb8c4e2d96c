"""A limit on how long nothing may happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class IdleTimer:
    """Calls `expired` once `seconds` have passed since the last `start` or `touch`, unless stopped.

    A touch costs a look at the clock: the reactor's timer is left alone and put off when it goes off too early.
    """

    def __init__(self, clock: Any, timeout: float, on_expired: Callable[[], None]) -> None:
        self._clock = clock
        self._timeout = timeout
        self._on_expired = on_expired
        self._last_activity = 0.0
        self._delayed_call: Any = None
        self._running = False

    def start(self) -> None:
        """Begin to count, anew where it counts already."""
        self._running = True
        self._last_activity = self._clock.seconds()
        if self._delayed_call is None:
            self._delayed_call = self._clock.callLater(self._timeout, self._check)

    def touch(self) -> None:
        """Note that something happened."""
        self._last_activity = self._clock.seconds()

    def pause(self) -> None:
        """Count no more until the next start; the timer stays, for a pause is often short."""
        self._running = False

    def stop(self) -> None:
        """Count no more, and leave nothing behind."""
        self._running = False
        call, self._delayed_call = self._delayed_call, None
        if call is not None:
            call.cancel()

    def _check(self) -> None:
        self._delayed_call = None
        if not self._running:
            return
        remaining = self._last_activity + self._timeout - self._clock.seconds()
        if remaining > 0:
            self._delayed_call = self._clock.callLater(remaining, self._check)
        else:
            self._running = False
            self._on_expired()
