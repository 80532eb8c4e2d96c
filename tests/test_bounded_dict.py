"""A mapping that never holds more than its bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from dockerproxy.bounded_dict import BoundedDict


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.integers(0, 8))))
def test_holds_the_most_recently_used_entries(bound: int, operations: list[tuple[bool, int]]) -> None:
    entries: BoundedDict[int, int] = BoundedDict(bound)
    recent: list[int] = []  # the least recently used first
    for is_set, key in operations:
        if is_set:
            entries[key] = -key
        else:
            assert entries.get(key) == (-key if key in recent else None)
        if is_set or key in recent:
            recent = [*(other for other in recent if other != key), key][-bound:]
        assert list(entries) == recent
        assert len(entries) <= bound


def test_an_entry_expires() -> None:
    clock = Clock()
    entries: BoundedDict[str, int] = BoundedDict(2, ttl=5, clock=clock.seconds)
    entries["a"] = 1
    clock.advance(4.9)
    assert "a" in entries
    entries["a"] = 2
    clock.advance(4.9)
    assert entries.get("a") == 2
    clock.advance(0.1)
    assert entries.get("a") is None
    assert len(entries) == 0


def test_an_entry_from_the_future_is_expired() -> None:
    now = [100.0]
    entries: BoundedDict[str, int] = BoundedDict(2, ttl=5, clock=lambda: now[0])
    entries["a"] = 1
    now[0] = 50.0
    assert entries.get("a") is None


def test_pop_and_clear() -> None:
    entries: BoundedDict[str, int] = BoundedDict(2)
    entries["a"], entries["b"] = 1, 2
    entries.pop("a")
    entries.pop("a")
    assert list(entries) == ["b"]
    entries.clear()
    assert "b" not in entries


@pytest.mark.parametrize(("bound", "ttl"), [(0, None), (-1, None), (1, 5.0)])
def test_bad_arguments(bound: int, ttl: float | None) -> None:
    with pytest.raises(ValueError, match="BoundedDict"):
        BoundedDict(bound, ttl=ttl)
