"""How long a client is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attrs import define, field

_AT_ONCE = 500  # clients that are looked after before others get their turn


class Wait(NamedTuple):
    """What is waited for, `since` when (the reactor's time), up to `limit` seconds.

    Then `expired` is called, and in every later round that finds it waited for still.
    """

    limit: float
    since: float
    expired: Callable[[], None]


class Rounds:
    """Has every client looked after again each `tick` seconds: by one timer, for one for each takes half a KiB."""

    def __init__(self, reactor: Any, tick: float) -> None:
        self.reactor = reactor
        self.tick = tick
        self._all: set[Patience] = set()
        self._due: list[Patience] = []  # of the round under way
        self._timer: Any = None

    def add(self, patience: Patience) -> None:
        """Look at this one, too, from the next round on."""
        self._all.add(patience)
        if self._timer is None:
            self._timer = self.reactor.callLater(self.tick, self._begin)

    def remove(self, patience: Patience) -> None:
        """Look at this one no more."""
        self._all.discard(patience)
        if not self._all and self._timer is not None and self._timer.active():  # else a round is under way
            self._timer.cancel()
            self._timer = None

    def _begin(self) -> None:
        self._due = list(self._all)
        self._go_on()

    def _go_on(self) -> None:
        due, self._due = self._due[:_AT_ONCE], self._due[_AT_ONCE:]
        for patience in due:
            if patience in self._all:
                patience.look()
        if self._due:
            self._timer = self.reactor.callLater(0, self._go_on)
        else:
            self._timer = self.reactor.callLater(self.tick, self._begin) if self._all else None


@define(eq=False)
class Patience:
    """Ends what takes a client too long.

    It asks what is waited for in every one of the `rounds`, and not only when a limit is near: whatever the client gets
    on with then has no need to set a timer anew. A limit that would be reached before the next one has a timer.
    """

    _rounds: Rounds
    _waiting_for: Callable[[], Wait] | None
    _timer: Any = field(default=None, init=False)
    _mark: tuple[object, float] = field(default=(None, 0.0), init=False)  # what was found, and since when
    since: float = field(default=0.0, init=False)
    """When the wait began that `note` was last called for."""

    def now(self) -> float:
        """Return the reactor's time."""
        now: float = self._rounds.reactor.seconds()
        return now

    def note(self) -> None:
        """Take note that a wait begins now."""
        self.since = self.now()

    def begin(self) -> None:
        """Begin to wait."""
        self.note()
        self._rounds.add(self)

    def end(self) -> None:
        """Wait for nothing any more, and let go of who knew what is waited for."""
        self._waiting_for = None
        self._rounds.remove(self)
        self._stop()

    def look_in(self, seconds: float) -> None:
        """Ask in so many seconds what is waited for, besides the rounds; not after the end."""
        self._stop()
        if self._waiting_for is not None:
            self._timer = self._rounds.reactor.callLater(seconds, self.look)

    def unmoved_since(self, mark: object) -> float:
        """Return when somebody first found what is found now, `mark`."""
        if mark != self._mark[0]:
            self._mark = (mark, self.now())
        return self._mark[1]

    def look(self) -> None:
        """End what has waited too long; come again when the next thing could have."""
        assert self._waiting_for is not None  # after the end nobody looks
        self._stop()
        wait = self._waiting_for()
        remaining = wait.limit - (self.now() - wait.since)
        if remaining <= 0:
            wait.expired()
        elif remaining < self._rounds.tick:
            self.look_in(remaining)

    def _stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
