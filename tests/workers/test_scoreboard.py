"""The shared memory of the processes."""

from __future__ import annotations

import os

import pytest

from dockerproxy.workers.scoreboard import Scoreboard


@pytest.fixture
def scoreboard() -> Scoreboard:
    return Scoreboard.create(3)


def test_reset(scoreboard: Scoreboard) -> None:
    scoreboard.reset(1, 7)
    assert (scoreboard.closed_connections(1), scoreboard.last_heartbeat(1)) == (0, 7)


def test_slots_are_independent(scoreboard: Scoreboard) -> None:
    for number in range(3):
        scoreboard.reset(number, 10 * number)
    scoreboard.count_closed(1)
    scoreboard.count_closed(1)
    scoreboard.count_closed(2)
    scoreboard.heartbeat(1, 99)
    assert [scoreboard.closed_connections(number) for number in range(3)] == [0, 2, 1]
    assert [scoreboard.last_heartbeat(number) for number in range(3)] == [0, 99, 20]


def test_reset_clears_the_slot(scoreboard: Scoreboard) -> None:
    scoreboard.count_closed(2)
    scoreboard.reset(2, 5)
    assert (scoreboard.closed_connections(2), scoreboard.last_heartbeat(2)) == (0, 5)


def test_memory_is_shared_after_fork(scoreboard: Scoreboard) -> None:
    pid = os.fork()
    if not pid:
        scoreboard.count_closed(1)
        scoreboard.heartbeat(1, 2**60)
        os._exit(0)
    os.waitpid(pid, 0)
    assert (scoreboard.closed_connections(1), scoreboard.last_heartbeat(1)) == (1, 2**60)
