"""Which of the cache's contents go. Pure: what is there comes in, what is to be removed comes out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from attrs import frozen

from dockerproxy.oci.names import Digest

# Freeing a little more than is needed makes room for the next blobs too, so that not each of them has to ask.
_LOW_WATERMARK = 0.95

BATCH_SIZE = 500
"""So many are chosen at once, where that will do: choosing, and forgetting them, takes 1 to 2 ms."""

LRUEntry = tuple[int, float]
"""Of a content that is kept: its length in bytes, and when it was last read or written (POSIX time).

A plain tuple, as `Entry` is not: the cyclic garbage collection, which stops all else, looks at those once only.
"""


@frozen(slots=True)
class Entry:
    """A content that is kept: its length in bytes, and when it was last read or written (POSIX time)."""

    digest: Digest
    size: int
    last_used: float


def inactive_since(entries: Mapping[str, LRUEntry], pins: Container[str], since: float) -> Iterator[str]:
    """Yield what was not used since then, `AT_ONCE` at most; of `kept`, the least recently used come first."""
    count = 0
    for key, (_, last_used) in entries.items():
        if last_used >= since or count == BATCH_SIZE:
            return
        if key not in pins:
            count += 1
            yield key


def least_recently_used(
    entries: Mapping[str, LRUEntry], pins: Container[str], minimum: int, target: int
) -> Iterator[str]:
    """Yield, in their order, those that have `enough` bytes, or more than `AT_ONCE` only until they have the `least`.

    Nothing in `keep`.
    """
    count = freed_bytes = 0
    for key, (size, _) in entries.items():
        if freed_bytes >= (target if count < BATCH_SIZE else minimum):
            return
        if key not in pins:
            count, freed_bytes = count + 1, freed_bytes + size
            yield key


def excess_bytes(total: int, limit: int) -> int:
    """Return how many of `total` bytes are to go: none up to `limit`, above it those over 95 % of it."""
    return total - int(limit * _LOW_WATERMARK) if total > limit else 0
