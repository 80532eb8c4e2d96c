"""Tests of `CooperativeThread`: the length of slices, locks, errors and cancellation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.store.cooperative import CooperativeThread, Progress, thread_cost
from tests.store.support.reactor import SteppedReactor


class TickingClock:
    """A clock that advances by one at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Steps:
    """Steps 0, 1, 2, …, of which some return results. Records the executed steps, and whether it was closed."""

    def __init__(self, count: int, results: frozenset[int] = frozenset()) -> None:
        self.count, self.results = count, results
        self.executed: list[int] = []
        self.closed = False

    def iterate(self) -> Iterator[int | None]:
        try:
            for number in range(self.count):
                self.executed.append(number)
                yield number if number in self.results else None
        finally:
            self.closed = True


def test_a_slice_ends_at_its_deadline() -> None:
    reactor, work, results, slices = SteppedReactor(), Steps(10, frozenset({4})), list[int](), list[int]()
    report = Progress[int](lambda *state: slices.append(state[1])).reporter("work", lambda: len(work.executed))
    reactor.run(
        CooperativeThread(reactor, slice_length=3, clock=TickingClock()).run(
            work.iterate(), results.append, after_slice=report
        )
    )
    assert slices == [3, 6, 9, 10]
    assert results == [4]
    assert work.closed


def test_results_per_slice_are_bounded() -> None:
    """This keeps the reactor iteration that consumes the results short."""
    reactor, work, results, counts = SteppedReactor(), Steps(300, frozenset(range(1, 300))), list[int](), list[int]()
    report = Progress[int](lambda *state: counts.append(state[1])).reporter("work", lambda: len(results))
    reactor.run(
        CooperativeThread(reactor, slice_length=1000, clock=lambda: 0).run(
            work.iterate(), results.append, after_slice=report
        )
    )
    assert counts == [128, 256, 299]
    assert results == list(range(1, 300))


def test_the_lock_is_held_for_one_slice() -> None:
    reactor, work, lock_states = SteppedReactor(), Steps(3), list[bool]()

    @asynccontextmanager
    async def lock() -> AsyncIterator[None]:
        lock_states.append(True)
        yield
        lock_states[-1] = False

    job = Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run(work.iterate(), lock=lock))
    for number in (1, 2, 3):
        assert lock_states == [*[False] * (number - 1), True]
        reactor.run_one()
        assert lock_states == [False] * number
        reactor.advance(1)
    reactor.run_one()
    assert job.called


def test_thread_cost_weighs_waiting_at_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"thread_time": 0.0, "monotonic": 0.0}
    for name in times:
        monkeypatch.setattr(f"dockerproxy.store.cooperative.time.{name}", lambda name=name: times[name])
    start = thread_cost()
    times["monotonic"] = 100
    assert thread_cost() - start == pytest.approx(10)
    times["thread_time"] = 100
    assert thread_cost() - start == pytest.approx(100)


# Parallel iterators


def test_run_parallel_runs_all_iterators() -> None:
    reactor, works, results = SteppedReactor(), [Steps(3, frozenset({1})), Steps(6, frozenset({4}))], list[int]()
    iterators = [work.iterate() for work in works]
    job = Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run_parallel(iterators, results.append))
    assert len(reactor.jobs) == 2
    while reactor.busy:
        reactor.run_one()
    assert job.called
    assert [len(work.executed) for work in works] == [3, 6]
    assert results == [1, 4]


@pytest.mark.parametrize("cause", ["cancelled", "broken"])
def test_one_failure_cancels_all_iterators(cause: str) -> None:
    reactor, work = SteppedReactor(), Steps(100)

    def broken() -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    iterators: list[Iterator[int | None]] = [Steps(100).iterate() if cause == "cancelled" else broken(), work.iterate()]
    job, outcomes = (
        Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run_parallel(iterators)),
        list[Any](),
    )
    job.addBoth(outcomes.append)
    for _ in range(4):
        reactor.run_one()
    if cause == "cancelled":
        job.cancel()
    while reactor.busy:
        reactor.run_one()
    assert outcomes[0].check(CancelledError if cause == "cancelled" else OSError)
    assert work.closed
    assert len(work.executed) < 10


# Pauses, cancellation and errors


def test_there_is_a_pause_between_two_slices() -> None:
    reactor, work = SteppedReactor(), Steps(4)
    job = Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1, pause=5).run(work.iterate()))
    for executed in ([0], [0, 1], [0, 1, 2]):
        reactor.run_one()
        assert (work.executed, len(reactor.jobs)) == (executed, 0)
        reactor.advance(4)
        assert not reactor.jobs
        reactor.advance(1)
    assert not job.called


def test_drain_suspends_the_work() -> None:
    reactor, work, ready = SteppedReactor(), Steps(3), Deferred[None]()

    async def wait() -> None:
        await ready

    report = Progress[int](drain=wait).reporter("work", lambda: 0)
    job = Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run(work.iterate(), after_slice=report))
    while reactor.busy:
        reactor.run_one()
    assert work.executed == [0]
    ready.callback(None)
    while reactor.busy:
        reactor.run_one()
    assert (work.executed, job.called) == ([0, 1, 2], True)


@pytest.mark.parametrize("moment", ["in a thread", "in a pause"])
def test_cancellation_waits_for_the_current_slice(moment: str) -> None:
    reactor, work, results = SteppedReactor(), Steps(5, frozenset({1})), list[int]()
    job, outcomes = (
        Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run(work.iterate(), results.append)),
        list[Any](),
    )
    job.addBoth(outcomes.append)
    reactor.run_one()
    if moment == "in a thread":
        reactor.run_one()
        assert len(reactor.jobs) == 1, "the second slice is queued"
    job.cancel()
    assert not outcomes
    while reactor.busy:
        reactor.run_one()
    assert (work.executed, results, work.closed) == ([0, 1] if moment == "in a thread" else [0], [], True)
    assert outcomes[0].check(CancelledError)


def test_errors_are_raised() -> None:
    reactor, work = SteppedReactor(), Steps(3, frozenset({1}))

    def consume(number: int) -> None:
        raise LookupError(number)

    with pytest.raises(LookupError):
        reactor.run(CooperativeThread(reactor).run(work.iterate(), consume))
    assert work.closed

    def broken() -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input"):
        reactor.run(CooperativeThread(reactor).run(broken()))
