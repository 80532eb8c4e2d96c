"""Deadlines of client connections, and the lowest rate at which a client must send and read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attrs import define, field

_RATE_WINDOW = 60.0  # seconds over which a rate is averaged
_CHECKS_PER_ITERATION = 500  # connections checked per reactor iteration, so that a sweep does not block the reactor


class Deadline(NamedTuple):
    """A limit of `timeout` seconds, counted from `started_at` in the reactor's time.

    `on_timeout` is called when it has passed, and again in every later sweep that finds the same deadline expired.
    """

    timeout: float
    started_at: float
    on_timeout: Callable[[], None]


class _Progress(NamedTuple):
    """The bytes that a client has sent or read, at the last check and at the beginning of the rate's window."""

    of: object
    size: int
    changed_at: float  # the first check that saw this size
    window_size: int
    window_start: float


class TimeoutReaper:
    """Checks every connection's deadline once per `tick` seconds with one shared delayed call.

    A delayed call per connection would cost 0.5 KiB each.
    """

    def __init__(self, reactor: Any, tick: float) -> None:
        self.reactor = reactor
        self.tick = tick
        self._timers: set[ConnectionTimer] = set()
        self._pending: list[ConnectionTimer] = []  # not yet checked in the current sweep
        self._delayed_call: Any = None

    def add(self, timer: ConnectionTimer) -> None:
        """Check `timer` from the next sweep on."""
        self._timers.add(timer)
        if self._delayed_call is None:
            self._delayed_call = self.reactor.callLater(self.tick, self._start_sweep)

    def remove(self, timer: ConnectionTimer) -> None:
        """Stop checking `timer`."""
        self._timers.discard(timer)
        # The delayed call is inactive during a sweep, which then decides whether to schedule the next one.
        if not self._timers and self._delayed_call is not None and self._delayed_call.active():
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
    """The deadline of one connection, which `get_deadline` computes at every check.

    Progress need not reset a timer, because the deadline is recomputed in every sweep of `reaper`. Only a deadline
    before the next sweep gets its own delayed call.
    """

    _reaper: TimeoutReaper
    _get_deadline: Callable[[], Deadline] | None
    _delayed_call: Any = field(default=None, init=False)
    _progress: _Progress | None = field(default=None, init=False)  # None if the last check did not ask for it
    started_at: float = field(default=0.0, init=False)
    """The time of the last `restart`."""

    def now(self) -> float:
        """Return the reactor's time."""
        now: float = self._reaper.reactor.seconds()
        return now

    def restart(self) -> None:
        """Count the timeout from now."""
        self.started_at = self.now()

    def start(self) -> None:
        """Count from now and have the deadline checked."""
        self.restart()
        self._reaper.add(self)

    def stop(self) -> None:
        """Stop checking, and drop `get_deadline`, which refers to the connection."""
        self._get_deadline = None
        self._reaper.remove(self)
        self._cancel_delayed_call()

    def check_in(self, seconds: float) -> None:
        """Check the deadline after `seconds` in addition to the sweeps. Do nothing if the timer was stopped."""
        self._cancel_delayed_call()
        if self._get_deadline is not None:
            self._delayed_call = self._reaper.reactor.callLater(seconds, self.check)

    def progress_deadline(
        self,
        of: object,
        size: int,
        timeout: float,
        on_timeout: Callable[[], None],
        min_rate: float,
        on_slow: Callable[[], None],
    ) -> Deadline:
        """Return the deadline of a client that must go on sending or reading; `size` has the bytes so far.

        It is `timeout` seconds after the last change of `size`. It has passed if `size` grew by less than `min_rate`
        bytes a second, on average over a minute in which every check asked for the progress `of` the same thing.
        """
        now, last = self.now(), self._progress
        if last is None or last.of != of:
            self._progress = _Progress(of, size, now, size, now)
            return Deadline(timeout, now, on_timeout)
        elapsed = now - last.window_start
        if elapsed >= _RATE_WINDOW:
            if size - last.window_size < min_rate * elapsed:
                return Deadline(0.0, now, on_slow)
            last = last._replace(window_size=size, window_start=now)
        changed_at = now if size != last.size else last.changed_at
        self._progress = last._replace(size=size, changed_at=changed_at)
        return Deadline(timeout, changed_at, on_timeout)

    def check(self) -> None:
        """Call `on_timeout` if the deadline has passed; schedule a check if it passes before the next sweep."""
        if self._get_deadline is None:
            raise RuntimeError("the timer was stopped")
        self._cancel_delayed_call()
        progress = self._progress
        deadline = self._get_deadline()
        if self._progress is progress:
            self._progress = None  # the client has nothing to do at the moment
        remaining = deadline.timeout - (self.now() - deadline.started_at)
        if remaining <= 0:
            deadline.on_timeout()
        elif remaining < self._reaper.tick:
            self.check_in(remaining)

    def _cancel_delayed_call(self) -> None:
        delayed_call, self._delayed_call = self._delayed_call, None
        if delayed_call is not None and delayed_call.active():
            delayed_call.cancel()
