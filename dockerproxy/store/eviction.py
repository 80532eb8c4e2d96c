"""Eviction policy of the cache: pure functions that choose the blobs to evict."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Generic, TypeVar

from attrs import frozen

from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import IngestKey

# Evict a little more than needed, so that the next blobs fit without another eviction.
_LOW_WATERMARK = 0.95

BATCH_SIZE = 500
"""Blobs chosen per call, unless more are needed. Choosing them and removing them from the index takes 1 to 2 ms."""

K = TypeVar("K", Digest, IngestKey)

CacheKey = Digest | IngestKey
"""A key of something in the cache: a blob, or a partial download."""

LRUEntry = tuple[int, float]
"""A blob's size in bytes, and the time of its last read or write (POSIX time).

This is a plain tuple, unlike `Entry`, because Python's garbage collector untracks tuples of numbers when it first sees
them. It stops the whole process while it looks at tracked objects.
"""


@frozen(slots=True)
class Entry(Generic[K]):
    """A cached blob or partial download: its size in bytes, and when it was last read or written (POSIX time)."""

    key: K
    size: int
    last_used: float


def inactive_since(entries: Mapping[str, LRUEntry], pins: Container[str], since: float) -> Iterator[str]:
    """Yield at most `BATCH_SIZE` unpinned keys that were last used before `since`.

    `entries` is ordered by last use, the least recent first.
    """
    count = 0
    for key, (_, last_used) in entries.items():
        if last_used >= since or count == BATCH_SIZE:
            return
        if key not in pins:
            count += 1
            yield key


def least_recently_used(
    entries: Mapping[str, LRUEntry], pins: Container[str], minimum: int, target: int, entry_cost: int = 0
) -> Iterator[str]:
    """Yield unpinned keys, in the order of `entries`, until their blobs have `target` bytes.

    Each counts `entry_cost` more than its size. After `BATCH_SIZE` keys, stop as soon as they have `minimum` bytes.
    """
    count = freed_bytes = 0
    for key, (size, _) in entries.items():
        if freed_bytes >= (target if count < BATCH_SIZE else minimum):
            return
        if key not in pins:
            count, freed_bytes = count + 1, freed_bytes + size + entry_cost
            yield key


def parse_key(text: str) -> CacheKey:
    """Return the key whose `str` is `text`."""
    return IngestKey.parse(text) if "/" in text else Digest.parse(text)


def excess_bytes(total: int, limit: int) -> int:
    """Return the bytes to evict: 0 if `total` is at most `limit`, otherwise those above 95 % of `limit`."""
    return total - int(limit * _LOW_WATERMARK) if total > limit else 0
