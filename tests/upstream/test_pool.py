"""Tests for the pool of idle connections."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from dockerproxy.upstream.pool import Pool


class FakeConnection:
    def __init__(self, key: str) -> None:
        self.key = key
        self.alive = True
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def make_pool(*keys: str) -> tuple[Clock, Any, list[Any]]:
    clock = Clock()
    pool = Pool(clock)
    connections: list[Any] = [FakeConnection(key) for key in keys]
    for connection in connections:
        pool.put(connection)
    return clock, pool, connections


def test_take_is_lifo() -> None:
    clock, pool, (one, two, other) = make_pool("a", "a", "b")
    assert [pool.take("a"), pool.take("a"), pool.take("a")] == [two, one, None]
    assert pool.take("b") is other
    assert clock.getDelayedCalls() == []


def test_dead_connection_is_skipped() -> None:
    _, pool, (one, two) = make_pool("a", "a")
    two.alive = False
    assert pool.take("a") is one


def test_idle_connection_is_closed_after_60_seconds() -> None:
    clock, pool, (one,) = make_pool("a")
    clock.advance(59)
    assert not one.aborted
    clock.advance(1)
    assert one.aborted
    assert pool.take("a") is None


def test_remove_cancels_the_timer() -> None:
    clock, pool, (one,) = make_pool("a")
    pool.remove(one)
    pool.remove(one)
    assert clock.getDelayedCalls() == []
    assert pool.take("a") is None


def test_oldest_connection_is_evicted_at_the_limits() -> None:
    _, _, connections = make_pool(*["a"] * 33)
    assert [connection.aborted for connection in connections] == [True] + [False] * 32
    _, _, connections = make_pool(*map(str, range(257)))
    assert [connection.aborted for connection in connections] == [True] + [False] * 256
