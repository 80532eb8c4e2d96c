"""Tests of `CooperativeThread`: the length of slices, pauses, errors and cancellation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred

from dockerproxy.store.cooperative import CooperativeThread, thread_cost
from tests.store.support.reactor import SteppedReactor


class TickingClock:
    """A clock that advances by one at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Steps:
    """Steps 0, 1, 2, …. Records the executed steps, and whether it was closed."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.executed: list[int] = []
        self.closed = False

    def iterate(self) -> Iterator[None]:
        try:
            for number in range(self.count):
                self.executed.append(number)
                yield None
        finally:
            self.closed = True


def test_a_slice_ends_at_its_deadline() -> None:
    reactor, work, slices = SteppedReactor(), Steps(10), list[int]()

    async def after_slice() -> None:
        slices.append(len(work.executed))

    thread = CooperativeThread(reactor, slice_length=3, clock=TickingClock())
    reactor.run(thread.run(work.iterate(), after_slice=after_slice))
    assert slices == [3, 6, 9, 10]
    assert work.closed


def test_thread_cost_weighs_waiting_at_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"thread_time": 0.0, "monotonic": 0.0}
    for name in times:
        monkeypatch.setattr(f"dockerproxy.store.cooperative.time.{name}", lambda name=name: times[name])
    start = thread_cost()
    times["monotonic"] = 100
    assert thread_cost() - start == pytest.approx(10)
    times["thread_time"] = 100
    assert thread_cost() - start == pytest.approx(100)


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


def test_the_work_waits_for_the_hook() -> None:
    reactor, work, ready = SteppedReactor(), Steps(3), Deferred[None]()

    async def wait() -> None:
        await ready

    job = Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run(work.iterate(), after_slice=wait))
    while reactor.busy:
        reactor.run_one()
    assert work.executed == [0]
    ready.callback(None)
    while reactor.busy:
        reactor.run_one()
    assert (work.executed, job.called) == ([0, 1, 2], True)


@pytest.mark.parametrize("moment", ["in a thread", "in a pause"])
def test_cancellation_waits_for_the_current_slice(moment: str) -> None:
    reactor, work, outcomes = SteppedReactor(), Steps(5), list[Any]()
    job = Deferred.fromCoroutine(CooperativeThread(reactor, slice_length=-1).run(work.iterate()))
    job.addBoth(outcomes.append)
    reactor.run_one()
    if moment == "in a thread":
        reactor.run_one()
        assert len(reactor.jobs) == 1, "the second slice is queued"
    job.cancel()
    assert not outcomes
    while reactor.busy:
        reactor.run_one()
    assert (work.executed, work.closed) == ([0, 1] if moment == "in a thread" else [0], True)
    assert outcomes[0].check(CancelledError)


def test_errors_are_raised() -> None:
    reactor, work = SteppedReactor(), Steps(3)

    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        reactor.run(CooperativeThread(reactor).run(work.iterate(), after_slice=fail))

    def broken() -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input"):
        reactor.run(CooperativeThread(reactor).run(broken()))
