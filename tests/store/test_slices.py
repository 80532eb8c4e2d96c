"""Work in slices: how long one is, what ends it, and what becomes of it when nobody wants it any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from workbench.reactor import Reactor

from dockerproxy.store.slices import Slices, Watch


class Time:
    """Passes by one each time it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Work:
    """Steps 0, 1, 2, … of which some are found; notes what is taken, and whether it was closed."""

    def __init__(self, count: int, found: frozenset[int] = frozenset()) -> None:
        self.count, self.found = count, found
        self.taken: list[int] = []
        self.closed = False

    def steps(self) -> Iterator[int | None]:
        try:
            for number in range(self.count):
                self.taken.append(number)
                yield number if number in self.found else None
        finally:
            self.closed = True


def test_a_slice_ends_with_its_time_or_with_something_found() -> None:
    reactor, work, used, slices = Reactor(), Work(10, frozenset({4})), list[int](), list[int]()
    told = Watch[int](lambda *state: slices.append(state[1])).of("work", lambda: len(work.taken))
    reactor.run(Slices(reactor, length=3, clock=Time()).run(work.steps(), used.append, after_slice=told))
    assert slices == [3, 5, 8, 10]
    assert used == [4]
    assert work.closed


def test_there_is_a_pause_between_two_slices() -> None:
    reactor, work = Reactor(), Work(4)
    under_way = Deferred.fromCoroutine(Slices(reactor, length=-1, pause=5).run(work.steps()))
    for taken in ([0], [0, 1], [0, 1, 2]):
        reactor.run_one()
        assert (work.taken, len(reactor.jobs)) == (taken, 0)
        reactor.advance(4)
        assert not reactor.jobs
        reactor.advance(1)
    assert not under_way.called


def test_a_listener_that_is_not_ready_holds_the_work() -> None:
    reactor, work, ready = Reactor(), Work(3), Deferred[None]()

    async def wait() -> None:
        await ready

    told = Watch[int](ready=wait).of("work", lambda: 0)
    under_way = Deferred.fromCoroutine(Slices(reactor, length=-1).run(work.steps(), after_slice=told))
    while reactor.busy:
        reactor.run_one()
    assert work.taken == [0]
    ready.callback(None)
    while reactor.busy:
        reactor.run_one()
    assert (work.taken, under_way.called) == ([0, 1, 2], True)


@pytest.mark.parametrize("moment", ["in a thread", "in a pause"])
def test_cancelled_it_ends_with_the_slice_under_way(moment: str) -> None:
    reactor, work, used = Reactor(), Work(5, frozenset({1})), list[int]()
    under_way, ended = Deferred.fromCoroutine(Slices(reactor, length=-1).run(work.steps(), used.append)), list[Any]()
    under_way.addBoth(ended.append)
    reactor.run_one()
    if moment == "in a thread":
        reactor.run_one()
        assert len(reactor.jobs) == 1, "the second slice"
    under_way.cancel()
    assert not ended
    while reactor.busy:
        reactor.run_one()
    assert (work.taken, used, work.closed) == ([0, 1] if moment == "in a thread" else [0], [], True)
    assert ended[0].check(CancelledError)


def test_what_goes_wrong_is_raised() -> None:
    reactor, work = Reactor(), Work(3, frozenset({1}))

    def use(number: int) -> None:
        raise LookupError(number)

    with pytest.raises(LookupError):
        reactor.run(Slices(reactor).run(work.steps(), use))
    assert work.closed

    def broken() -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input"):
        reactor.run(Slices(reactor).run(broken()))
