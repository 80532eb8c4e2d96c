"""Which of the cache's contents go. Pure: what is there comes in, what is to be removed comes out."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from attrs import frozen

from dockerproxy.oci.names import Digest

# Freeing a little more than is needed makes room for the next blobs too, so that not each of them has to ask.
_FILL = 0.95

AT_ONCE = 500
"""So many are chosen at once, where that will do: choosing, and forgetting them, takes 1 to 2 ms."""

Known = tuple[int, float]
"""Of a content that is kept: its length in bytes, and when it was last read or written (POSIX time).

A plain tuple, as `Entry` is not: the cyclic garbage collection, which stops all else, looks at those once only.
"""


@frozen(slots=True)
class Entry:
    """A content that is kept: its length in bytes, and when it was last read or written (POSIX time)."""

    digest: Digest
    size: int
    last_used: float


def unused(kept: Mapping[str, Known], keep: Container[str], since: float) -> Iterator[str]:
    """Yield what was not used since then, `AT_ONCE` at most; of `kept`, the least recently used come first."""
    count = 0
    for text, (_, last_used) in kept.items():
        if last_used >= since or count == AT_ONCE:
            return
        if text not in keep:
            count += 1
            yield text


def oldest(kept: Mapping[str, Known], keep: Container[str], least: int, enough: int) -> Iterator[str]:
    """Yield, in their order, those that have `enough` bytes, or more than `AT_ONCE` only until they have the `least`.

    Nothing in `keep`.
    """
    count = freed = 0
    for text, (size, _) in kept.items():
        if freed >= (enough if count < AT_ONCE else least):
            return
        if text not in keep:
            count, freed = count + 1, freed + size
            yield text


def excess_of(total: int, limit: int) -> int:
    """Return how many of `total` bytes are to go: none up to `limit`, above it those over 95 % of it."""
    return total - int(limit * _FILL) if total > limit else 0
