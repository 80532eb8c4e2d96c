"""How long a client is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attrs import define, field

_CHECKS_PER_ITERATION = 500  # clients that are looked after before others get their turn


class Deadline(NamedTuple):
    """What is waited for, `since` when (the reactor's time), up to `limit` seconds.

    Then `expired` is called, and in every later round that finds it waited for still.
    """

    timeout: float
    started_at: float
    on_timeout: Callable[[], None]


class TimeoutReaper:
    """Has every client looked after again each `tick` seconds: by one timer, for one for each takes half a KiB."""

    def __init__(self, reactor: Any, tick: float) -> None:
        self.reactor = reactor
        self.tick = tick
        self._timers: set[ConnectionTimer] = set()
        self._pending: list[ConnectionTimer] = []  # of the round under way
        self._delayed_call: Any = None

    def add(self, timer: ConnectionTimer) -> None:
        """Look at this one, too, from the next round on."""
        self._timers.add(timer)
        if self._delayed_call is None:
            self._delayed_call = self.reactor.callLater(self.tick, self._start_sweep)

    def remove(self, timer: ConnectionTimer) -> None:
        """Look at this one no more."""
        self._timers.discard(timer)
        if (
            not self._timers and self._delayed_call is not None and self._delayed_call.active()
        ):  # else a round is under way
            self._delayed_call.cancel()
            self._delayed_call = None

    def _start_sweep(self) -> None:
        self._pending = list(self._timers)
        self._check_batch()

    def _check_batch(self) -> None:
        batch, self._pending = self._pending[:_CHECKS_PER_ITERATION], self._pending[_CHECKS_PER_ITERATION:]
        for timer in batch:
            if timer in self._timers:
                timer.check()
        if self._pending:
            self._delayed_call = self.reactor.callLater(0, self._check_batch)
        else:
            self._delayed_call = self.reactor.callLater(self.tick, self._start_sweep) if self._timers else None


@define(eq=False)
class ConnectionTimer:
    """Ends what takes a client too long.

    It asks what is waited for in every one of the `rounds`, and not only when a limit is near: whatever the client gets
    on with then has no need to set a timer anew. A limit that would be reached before the next one has a timer.
    """

    _reaper: TimeoutReaper
    _get_deadline: Callable[[], Deadline] | None
    _delayed_call: Any = field(default=None, init=False)
    _last_progress: tuple[object, float] = field(default=(None, 0.0), init=False)  # what was found, and since when
    started_at: float = field(default=0.0, init=False)
    """When the wait began that `note` was last called for."""

    def now(self) -> float:
        """Return the reactor's time."""
        now: float = self._reaper.reactor.seconds()
        return now

    def restart(self) -> None:
        """Take note that a wait begins now."""
        self.started_at = self.now()

    def start(self) -> None:
        """Begin to wait."""
        self.restart()
        self._reaper.add(self)

    def stop(self) -> None:
        """Wait for nothing any more, and let go of who knew what is waited for."""
        self._get_deadline = None
        self._reaper.remove(self)
        self._cancel_delayed_call()

    def check_in(self, seconds: float) -> None:
        """Ask in so many seconds what is waited for, besides the rounds; not after the end."""
        self._cancel_delayed_call()
        if self._get_deadline is not None:
            self._delayed_call = self._reaper.reactor.callLater(seconds, self.check)

    def last_progress(self, progress: object) -> float:
        """Return when somebody first found what is found now, `mark`."""
        if progress != self._last_progress[0]:
            self._last_progress = (progress, self.now())
        return self._last_progress[1]

    def check(self) -> None:
        """End what has waited too long; come again when the next thing could have."""
        assert self._get_deadline is not None  # after the end nobody looks
        self._cancel_delayed_call()
        deadline = self._get_deadline()
        remaining = deadline.timeout - (self.now() - deadline.started_at)
        if remaining <= 0:
            deadline.on_timeout()
        elif remaining < self._reaper.tick:
            self.check_in(remaining)

    def _cancel_delayed_call(self) -> None:
        delayed_call, self._delayed_call = self._delayed_call, None
        if delayed_call is not None and delayed_call.active():
            delayed_call.cancel()
