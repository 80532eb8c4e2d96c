"""A timer that expires after a period without activity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class IdleTimer:
    """Calls `on_expired` once `timeout` seconds have passed since the last `start` or `touch`, unless it is stopped.

    A touch only reads the clock. It does not reset the reactor's timer, which is rescheduled if it fires too early.
    """

    def __init__(self, clock: Any, timeout: float, on_expired: Callable[[], None]) -> None:
        self._clock = clock
        self._timeout = timeout
        self._on_expired = on_expired
        self._last_activity = 0.0
        self._delayed_call: Any = None
        self._running = False

    def start(self) -> None:
        """Start or restart the timer."""
        self._running = True
        self._last_activity = self._clock.seconds()
        if self._delayed_call is None:
            self._delayed_call = self._clock.callLater(self._timeout, self._check)

    def touch(self) -> None:
        """Record activity."""
        self._last_activity = self._clock.seconds()

    def pause(self) -> None:
        """Suspend until the next `start`. The reactor's timer is kept, because most pauses are short."""
        self._running = False

    def stop(self) -> None:
        """Stop, and cancel the reactor's timer."""
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
