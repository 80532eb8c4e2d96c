"""When a client's time is up, by a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable

from attrs import define, field
from twisted.internet.task import Clock

from dockerproxy.http.patience import Patience, Wait


@define
class Case:
    """A client that is waited for from `begin` on, for 10 seconds; every 4 it is looked after."""

    clock: Clock = field(factory=Clock)
    expired: list[float] = field(factory=list)
    since: Callable[[], float] | None = None
    patience: Patience = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.patience = Patience(self.clock, 4.0, self.wait)
        self.patience.begin()

    def wait(self) -> Wait:
        since = self.patience.since if self.since is None else self.since()
        return Wait(10.0, since, lambda: self.expired.append(self.clock.seconds()))


def test_a_limit_is_met_to_the_moment() -> None:
    case = Case()
    case.clock.pump([1.0] * 30)
    assert case.expired == [10.0]


def test_what_is_noted_begins_anew() -> None:
    case = Case()
    case.clock.pump([1.0] * 7)
    case.patience.note()
    case.clock.pump([1.0] * 30)
    assert case.expired == [17.0]


def test_who_makes_progress_is_waited_for() -> None:
    """As often as somebody looks; a client that stopped in between gets up to as much more."""
    case = Case()
    case.since = lambda: case.patience.unmoved_since(min(20.0, case.clock.seconds()))
    case.clock.pump([1.0] * 40)
    assert case.expired == [30.0]


def test_after_the_end_nothing_is_waited_for() -> None:
    case = Case()
    case.patience.end()
    case.patience.look_in(1.0)
    assert case.clock.getDelayedCalls() == []
