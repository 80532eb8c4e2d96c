"""Work in slices: how long one is, what ends it, and what becomes of it when nobody wants it any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.store.slices import Slices, Watch, burden
from tests.store.workbench.reactor import Reactor


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


def test_a_slice_ends_with_its_time() -> None:
    reactor, work, used, slices = Reactor(), Work(10, frozenset({4})), list[int](), list[int]()
    told = Watch[int](lambda *state: slices.append(state[1])).of("work", lambda: len(work.taken))
    reactor.run(Slices(reactor, length=3, clock=Time()).run(work.steps(), used.append, after_slice=told))
    assert slices == [3, 6, 9, 10]
    assert used == [4]
    assert work.closed


def test_so_much_is_found_in_a_slice_at_most() -> None:
    """The reactor's turn that uses it is as short as that."""
    reactor, work, used, turns = Reactor(), Work(300, frozenset(range(1, 300))), list[int](), list[int]()
    told = Watch[int](lambda *state: turns.append(state[1])).of("work", lambda: len(used))
    reactor.run(Slices(reactor, length=1000, clock=lambda: 0).run(work.steps(), used.append, after_slice=told))
    assert turns == [128, 256, 299]
    assert used == list(range(1, 300))


def test_a_turn_is_held_for_a_slice_and_no_longer() -> None:
    reactor, work, held = Reactor(), Work(3), list[bool]()

    @asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        held.append(True)
        yield
        held[-1] = False

    under_way = Deferred.fromCoroutine(Slices(reactor, length=-1).run(work.steps(), turn=turn))
    for number in (1, 2, 3):
        assert held == [*[False] * (number - 1), True]
        reactor.run_one()
        assert held == [False] * number
        reactor.advance(1)
    reactor.run_one()
    assert under_way.called


def test_waiting_counts_a_tenth_of_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"thread_time": 0.0, "monotonic": 0.0}
    for name in times:
        monkeypatch.setattr(f"dockerproxy.store.slices.time.{name}", lambda name=name: times[name])
    start = burden()
    times["monotonic"] = 100
    assert burden() - start == pytest.approx(10)
    times["thread_time"] = 100
    assert burden() - start == pytest.approx(100)


# side by side


def test_lanes_go_on_side_by_side() -> None:
    reactor, works, used = Reactor(), [Work(3, frozenset({1})), Work(6, frozenset({4}))], list[int]()
    lanes = [work.steps() for work in works]
    under_way = Deferred.fromCoroutine(Slices(reactor, length=-1).run_beside(lanes, used.append))
    assert len(reactor.jobs) == 2
    while reactor.busy:
        reactor.run_one()
    assert under_way.called
    assert [len(work.taken) for work in works] == [3, 6]
    assert used == [1, 4]


@pytest.mark.parametrize("how", ["cancelled", "broken"])
def test_where_one_lane_ends_early_all_do(how: str) -> None:
    reactor, work = Reactor(), Work(100)

    def broken() -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    lanes: list[Iterator[int | None]] = [Work(100).steps() if how == "cancelled" else broken(), work.steps()]
    under_way, ended = Deferred.fromCoroutine(Slices(reactor, length=-1).run_beside(lanes)), list[Any]()
    under_way.addBoth(ended.append)
    for _ in range(4):
        reactor.run_one()
    if how == "cancelled":
        under_way.cancel()
    while reactor.busy:
        reactor.run_one()
    assert ended[0].check(CancelledError if how == "cancelled" else OSError)
    assert work.closed
    assert len(work.taken) < 10


# how it ends


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
