"""When a client's time is up, by a clock of the test's."""

from __future__ import annotations

import math
from collections.abc import Callable

from attrs import define, field
from twisted.internet.task import Clock

from dockerproxy.http.patience import Patience, Rounds, Wait


@define
class Case:
    """A client that is waited for from `begin` on, for 10 seconds; every 4 it is looked after."""

    clock: Clock = field(factory=Clock)
    expired: list[float] = field(factory=list)
    since: Callable[[], float] | None = None
    stays: bool = False
    patience: Patience = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.patience = Patience(Rounds(self.clock, 4.0), self.wait)
        self.patience.begin()

    def wait(self) -> Wait:
        since = self.patience.since if self.since is None else self.since()
        return Wait(10.0, since, self.expire)

    def expire(self) -> None:
        self.expired.append(self.clock.seconds())
        if not self.stays:
            self.patience.end()


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


def test_what_did_not_help_is_done_again() -> None:
    case = Case(stays=True)
    case.clock.pump([1.0] * 17)
    assert case.expired == [10.0, 12.0, 16.0]


def test_after_the_end_nothing_is_waited_for() -> None:
    case = Case()
    case.patience.end()
    case.patience.look_in(1.0)
    assert case.clock.getDelayedCalls() == []


@define(eq=False)
class Client:
    """One of many: how often it was looked after, and what is done then."""

    rounds: Rounds
    looked: int = 0
    then: Callable[[], None] = lambda: None
    patience: Patience = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.patience = Patience(self.rounds, self.wait)
        self.patience.begin()

    def wait(self) -> Wait:
        self.looked += 1
        self.then()
        return Wait(math.inf, 0.0, lambda: None)


def test_one_timer_does_for_all() -> None:
    clock = Clock()
    rounds = Rounds(clock, 4.0)
    clients = [Client(rounds) for _ in range(10)]
    assert len(clock.getDelayedCalls()) == 1
    clock.pump([4.0] * 3)
    assert [client.looked for client in clients] == [3] * 10
    for client in clients:
        client.patience.end()
    assert clock.getDelayedCalls() == []


def test_many_are_not_looked_after_in_one_turn() -> None:
    clock = Clock()
    rounds = Rounds(clock, 4.0)
    clients = [Client(rounds) for _ in range(1200)]
    seen: list[int] = []

    def turn() -> None:
        seen.append(sum(client.looked for client in clients))
        if seen[-1] < 1200:
            clock.callLater(0, turn)

    clock.callLater(4.0, turn)
    clock.advance(4.0)
    assert seen == [500, 1000, 1200]
    clock.advance(4.0)
    assert sum(client.looked for client in clients) == 2400


def test_who_goes_in_a_round_is_not_looked_after() -> None:
    clock = Clock()
    rounds = Rounds(clock, 4.0)
    clients = [Client(rounds) for _ in range(3)]
    for client in clients:
        client.then = lambda: [other.patience.end() for other in clients if not other.looked] and None
    clock.advance(4.0)
    assert sorted(client.looked for client in clients) == [0, 0, 1]
    clock.advance(4.0)
    assert sorted(client.looked for client in clients) == [0, 0, 2]


def test_who_comes_in_a_round_in_which_all_go() -> None:
    clock = Clock()
    rounds = Rounds(clock, 4.0)
    first, new = Client(rounds), list[Client]()

    def change() -> None:
        first.patience.end()
        new.append(Client(rounds))

    first.then = change
    clock.advance(4.0)
    assert len(clock.getDelayedCalls()) == 1
    clock.advance(4.0)
    assert (first.looked, new[0].looked) == (1, 1)
