"""Tests of `CooperativeThread`: pauses, errors and the stop."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dockerproxy.store.cooperative import CooperativeThread
from dockerproxy.store.progress import Stopped
from tests.store.support.reactor import SteppedReactor


class ProcessorClock:
    """The processor time of a thread with steps of 0.4 ms. Records the number of steps before each pause."""

    def __init__(self) -> None:
        self.steps = 0
        self.pauses: list[int] = []

    def __call__(self) -> float:
        return self.steps * 0.0004

    def sleep(self, seconds: float) -> None:
        assert seconds == 0.001
        self.pauses.append(self.steps)

    def iterate(self, count: int) -> Iterator[None]:
        for _ in range(count):
            self.steps += 1
            yield None


def test_the_thread_sleeps_after_each_millisecond_of_processor_time() -> None:
    reactor, clock = SteppedReactor(), ProcessorClock()
    thread = CooperativeThread(reactor, clock=clock, sleep=clock.sleep)
    reactor.run(thread.run(clock.iterate(10)))
    assert clock.steps == 10
    assert clock.pauses == [3, 6, 9]


def test_a_stop_ends_all_runs_after_their_steps() -> None:
    reactor, clock = SteppedReactor(), ProcessorClock()
    thread = CooperativeThread(reactor)

    def stop_in_the_middle() -> Iterator[None]:
        yield from clock.iterate(3)
        thread.stop()
        yield from clock.iterate(100)

    for steps, executed in ((stop_in_the_middle(), 4), (clock.iterate(100), 5)):
        with pytest.raises(Stopped):
            reactor.run(thread.run(steps))
        assert clock.steps == executed


def test_errors_are_raised() -> None:
    def broken() -> Iterator[None]:
        yield None
        raise OSError(5, "Input/output error")

    reactor = SteppedReactor()
    with pytest.raises(OSError, match="Input"):
        reactor.run(CooperativeThread(reactor).run(broken()))
