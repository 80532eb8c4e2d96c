"""A mapping with a bound: what keeps a table that clients can fill from growing for ever."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedDict(Generic[K, V]):
    """At most `max_entries` values by key; the least recently set or read entry is dropped first.

    With a `ttl`, an entry expires that many seconds of `clock` after it was set.
    """

    def __init__(self, max_entries: int, *, ttl: float | None = None, clock: Callable[[], float] | None = None) -> None:
        if max_entries < 1 or (ttl is not None and clock is None):
            raise ValueError("a BoundedDict needs room for an entry, and a clock if it has a TTL")
        self._max_entries = max_entries
        self._ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = self._now(), value
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def get(self, key: K) -> V | None:
        """Return the value of `key`, or None if there is none or it has expired."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._ttl is not None and not 0 <= self._now() - entry[0] < self._ttl:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def pop(self, key: K) -> None:
        """Remove `key` if it is there."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def _now(self) -> float:
        return self._clock() if self._clock is not None else 0.0
