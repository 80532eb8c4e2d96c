"""The shared memory of the processes."""

from __future__ import annotations

import os

import pytest
from twisted.internet.task import Clock

from dockerproxy.workers import scoreboard as scoreboard_module
from dockerproxy.workers.scoreboard import HEARTBEAT_INTERVAL, Scoreboard, Slot, heartbeat_service


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock with the time of the heartbeats."""
    clock = Clock()
    monkeypatch.setattr(scoreboard_module.time, "monotonic_ns", lambda: int(clock.seconds() * 1e9))
    return clock


@pytest.fixture
def slots(clock: Clock) -> list[Slot]:
    scoreboard = Scoreboard.create(3, 2)
    return [scoreboard.slot(number) for number in range(3)]


def test_slots_are_independent(slots: list[Slot], clock: Clock) -> None:
    for number, slot in enumerate(slots):
        clock.advance(1)
        slot.reset()
        for _ in range(number):
            slot.count_closed(0)
    clock.advance(6)
    slots[1].heartbeat()
    assert [slot.closed_connections for slot in slots] == [0, 1, 2]
    assert [slot.last_heartbeat for slot in slots] == [1e9, 9e9, 3e9]
    assert [(slot.closed_by_client(0), slot.closed_by_client(1)) for slot in slots] == [(0, 0), (1, 0), (2, 0)]


def test_reset_clears_the_slot(slots: list[Slot], clock: Clock) -> None:
    slots[2].count_closed(1)
    clock.advance(5)
    slots[2].reset()
    assert (slots[2].closed_connections, slots[2].last_heartbeat) == (0, 5e9)
    assert slots[2].closed_by_client(1) == 1, "the main process knows the difference to its last look"


def test_heartbeat_service(slots: list[Slot], clock: Clock) -> None:
    service = heartbeat_service(clock, slots[1])
    service.startService()  # type: ignore[no-untyped-call]
    clock.pump([HEARTBEAT_INTERVAL] * 3)
    assert slots[1].last_heartbeat == 3 * HEARTBEAT_INTERVAL * 1e9


def test_memory_is_shared_after_fork(slots: list[Slot]) -> None:
    pid = os.fork()
    if not pid:
        slots[1].count_closed(1)
        scoreboard_module.time.monotonic_ns = lambda: 2**60  # type: ignore[assignment]
        slots[1].heartbeat()
        os._exit(0)
    os.waitpid(pid, 0)
    assert (slots[1].closed_connections, slots[1].last_heartbeat) == (1, 2**60)
