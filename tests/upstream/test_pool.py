from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from dockerproxy.upstream.pool import Pool


class Idle:
    def __init__(self, key: str) -> None:
        self.key = key
        self.alive = True
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def filled(*keys: str) -> tuple[Clock, Any, list[Any]]:
    clock = Clock()
    pool = Pool(clock)
    connections: list[Any] = [Idle(key) for key in keys]
    for connection in connections:
        pool.put(connection)
    return clock, pool, connections


def test_the_last_one_comes_first_and_once() -> None:
    clock, pool, (one, two, other) = filled("a", "a", "b")
    assert [pool.take("a"), pool.take("a"), pool.take("a")] == [two, one, None]
    assert pool.take("b") is other
    assert clock.getDelayedCalls() == []


def test_a_dead_one_is_not_given() -> None:
    _, pool, (one, two) = filled("a", "a")
    two.alive = False
    assert pool.take("a") is one


def test_closed_after_a_minute() -> None:
    clock, pool, (one,) = filled("a")
    clock.advance(59)
    assert not one.aborted
    clock.advance(1)
    assert one.aborted
    assert pool.take("a") is None


def test_a_removed_one_leaves_nothing() -> None:
    clock, pool, (one,) = filled("a")
    pool.remove(one)
    pool.remove(one)
    assert clock.getDelayedCalls() == []
    assert pool.take("a") is None


def test_bounds() -> None:
    _, _, connections = filled(*["a"] * 33)
    assert [connection.aborted for connection in connections] == [True] + [False] * 32
    _, _, connections = filled(*map(str, range(257)))
    assert [connection.aborted for connection in connections] == [True] + [False] * 256
