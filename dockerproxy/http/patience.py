"""How long a client is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attrs import define, field


class Wait(NamedTuple):
    """What is waited for, `since` when (the reactor's time), up to `limit` seconds; then `expired` is called."""

    limit: float
    since: float
    expired: Callable[[], None]


@define(eq=False)
class Patience:
    """Ends what takes a client too long.

    It asks what is waited for every `tick` seconds, and not only when a limit is near: whatever the client gets on with
    then has no need to set a timer anew.
    """

    _reactor: Any
    _tick: float
    _waiting_for: Callable[[], Wait] | None
    _timer: Any = field(default=None, init=False)
    _mark: tuple[object, float] = field(default=(None, 0.0), init=False)  # what was found, and since when
    since: float = field(default=0.0, init=False)
    """When the wait began that `note` was last called for."""

    def now(self) -> float:
        """Return the reactor's time."""
        now: float = self._reactor.seconds()
        return now

    def note(self) -> None:
        """Take note that a wait begins now."""
        self.since = self.now()

    def begin(self) -> None:
        """Begin to wait."""
        self.note()
        self.look_in(self._tick)

    def end(self) -> None:
        """Wait for nothing any more, and let go of who knew what is waited for."""
        self._waiting_for = None
        self._stop()

    def look_in(self, seconds: float) -> None:
        """Ask in so many seconds what is waited for, and not before; not after the end."""
        self._stop()
        if self._waiting_for is not None:
            self._timer = self._reactor.callLater(seconds, self._look)

    def unmoved_since(self, mark: object) -> float:
        """Return when somebody first found what is found now, `mark`."""
        if mark != self._mark[0]:
            self._mark = (mark, self.now())
        return self._mark[1]

    def _look(self) -> None:
        """End what has waited too long; come again when the next thing could have."""
        assert self._waiting_for is not None  # or the timer was stopped
        self._timer = None
        wait = self._waiting_for()
        remaining = wait.limit - (self.now() - wait.since)
        if remaining > 0:
            self.look_in(min(remaining, self._tick))
        else:
            wait.expired()

    def _stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
