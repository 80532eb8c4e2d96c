"""Connection timers and the timeout reaper, on a Clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from attrs import define, field
from twisted.internet.task import Clock

from dockerproxy.http.timeouts import ConnectionTimer, Deadline, TimeoutReaper


@define
class TimerCase:
    """A timer with a timeout of 10 seconds, checked every 4 seconds. The timeout counts from `started_at`."""

    clock: Clock = field(factory=Clock)
    timeouts: list[float] = field(factory=list)
    started_at: Callable[[], float] | None = None
    get_deadline: Callable[[], Deadline] | None = None
    stays_open: bool = False
    timer: ConnectionTimer = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.timer = ConnectionTimer(TimeoutReaper(self.clock, 4.0), self.deadline)
        self.timer.start()

    def deadline(self) -> Deadline:
        if self.get_deadline is not None:
            return self.get_deadline()
        started_at = self.timer.started_at if self.started_at is None else self.started_at()
        return Deadline(10.0, started_at, self.on_timeout)

    def on_timeout(self) -> None:
        self.timeouts.append(self.clock.seconds())
        if not self.stays_open:
            self.timer.stop()


def test_timeout_fires_on_time() -> None:
    case = TimerCase()
    case.clock.pump([1.0] * 30)
    assert case.timeouts == [10.0]


def test_restart_extends_the_deadline() -> None:
    case = TimerCase()
    case.clock.pump([1.0] * 7)
    case.timer.restart()
    case.clock.pump([1.0] * 30)
    assert case.timeouts == [17.0]


def test_progress_extends_the_deadline() -> None:
    """Progress is noticed at the checks only, so the deadline may be up to one tick late."""
    case = TimerCase()
    case.started_at = lambda: progress(case, lambda seconds: min(20, int(seconds))).started_at
    case.clock.pump([1.0] * 40)
    assert case.timeouts == [30.0]


def progress(case: TimerCase, size: Callable[[float], int], of: str = "response") -> Deadline:
    """Return the deadline of a client that has read `size(seconds)` bytes, and must read 10 bytes a second."""
    received = size(case.clock.seconds())
    return case.timer.progress_deadline(of, received, 1000.0, case.on_timeout, 10.0, case.on_timeout)


@pytest.mark.parametrize(("rate", "is_slow"), [(9, True), (11, False)])
def test_a_rate_is_averaged_over_a_minute(rate: int, is_slow: bool) -> None:
    case = TimerCase()
    case.get_deadline = lambda: progress(case, lambda seconds: int(seconds) * rate)
    case.clock.pump([1.0] * 60)
    assert not case.timeouts
    case.clock.pump([1.0] * 10)
    assert bool(case.timeouts) == is_slow


def test_a_burst_in_each_minute_is_fast_enough() -> None:
    case = TimerCase()
    case.get_deadline = lambda: progress(case, lambda seconds: int(seconds) // 30 * 400)
    case.clock.pump([1.0] * 600)
    assert not case.timeouts


@pytest.mark.parametrize("is_pause", [True, False])
def test_a_pause_or_another_body_begins_a_new_minute(is_pause: bool) -> None:
    case = TimerCase()
    case.get_deadline = lambda: progress(case, lambda seconds: 0)
    case.clock.pump([1.0] * 50)
    if is_pause:
        case.get_deadline = lambda: Deadline(math.inf, 0.0, case.on_timeout)  # the handler is working
        case.clock.pump([1.0] * 4)
        case.get_deadline = lambda: progress(case, lambda seconds: 0)
    else:
        case.get_deadline = lambda: progress(case, lambda seconds: 0, "another body")
    case.clock.pump([1.0] * 60)
    assert not case.timeouts
    case.clock.pump([1.0] * 8)
    assert case.timeouts


def test_on_timeout_is_repeated_until_stopped() -> None:
    case = TimerCase(stays_open=True)
    case.clock.pump([1.0] * 17)
    assert case.timeouts == [10.0, 12.0, 16.0]


def test_no_check_after_stop() -> None:
    case = TimerCase()
    case.timer.stop()
    case.timer.check_in(1.0)
    assert case.clock.getDelayedCalls() == []


@define(eq=False)
class CheckedConnection:
    """A connection whose deadline counts its checks and calls `on_check`."""

    reaper: TimeoutReaper
    check_count: int = 0
    on_check: Callable[[], None] = lambda: None
    timer: ConnectionTimer = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.timer = ConnectionTimer(self.reaper, self.deadline)
        self.timer.start()

    def deadline(self) -> Deadline:
        self.check_count += 1
        self.on_check()
        return Deadline(math.inf, 0.0, lambda: None)


def test_one_delayed_call_serves_all_timers() -> None:
    clock = Clock()
    reaper = TimeoutReaper(clock, 4.0)
    clients = [CheckedConnection(reaper) for _ in range(10)]
    assert len(clock.getDelayedCalls()) == 1
    clock.pump([4.0] * 3)
    assert [client.check_count for client in clients] == [3] * 10
    for client in clients:
        client.timer.stop()
    assert clock.getDelayedCalls() == []


def test_checks_are_spread_over_reactor_iterations() -> None:
    clock = Clock()
    reaper = TimeoutReaper(clock, 4.0)
    clients = [CheckedConnection(reaper) for _ in range(1200)]
    totals: list[int] = []

    def record() -> None:
        totals.append(sum(client.check_count for client in clients))
        if totals[-1] < 1200:
            clock.callLater(0, record)

    clock.callLater(4.0, record)
    clock.advance(4.0)
    assert totals == [500, 1000, 1200]
    clock.advance(4.0)
    assert sum(client.check_count for client in clients) == 2400


def test_timer_stopped_during_a_sweep_is_not_checked() -> None:
    clock = Clock()
    reaper = TimeoutReaper(clock, 4.0)
    clients = [CheckedConnection(reaper) for _ in range(3)]
    for client in clients:
        client.on_check = lambda: [other.timer.stop() for other in clients if not other.check_count] and None
    clock.advance(4.0)
    assert sorted(client.check_count for client in clients) == [0, 0, 1]
    clock.advance(4.0)
    assert sorted(client.check_count for client in clients) == [0, 0, 2]


def test_timer_started_while_the_last_one_stops() -> None:
    clock = Clock()
    reaper = TimeoutReaper(clock, 4.0)
    first, new = CheckedConnection(reaper), list[CheckedConnection]()

    def change() -> None:
        first.timer.stop()
        new.append(CheckedConnection(reaper))

    first.on_check = change
    clock.advance(4.0)
    assert len(clock.getDelayedCalls()) == 1
    clock.advance(4.0)
    assert (first.check_count, new[0].check_count) == (1, 1)


def test_a_stopped_timer_cannot_be_checked() -> None:
    client = CheckedConnection(TimeoutReaper(Clock(), 4.0))
    client.timer.stop()
    with pytest.raises(RuntimeError, match="the timer was stopped"):
        client.timer.check()
