"""Which of the cache's contents go. Pure: what is there comes in, what is to be removed comes out."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from attrs import frozen

from dockerproxy.oci.names import Digest

# Freeing a little more than is needed makes room for the next blobs too, so that not each of them has to ask.
_FILL = 0.95


@frozen(slots=True)
class Entry:
    """A content that is kept: its length in bytes, and when it was last read or written (POSIX time)."""

    digest: Digest
    size: int
    last_used: float


def choose(
    entries: Iterable[Entry], *, limit: int, inactive: float, now: float, keep: Container[Digest]
) -> list[Digest]:
    """Return what to remove: what was not used for `inactive` seconds, then the least recently used.

    The latter only where the rest has more than `limit` bytes, and then down to 95 % of it. Nothing in `keep` goes.
    """
    ordered = sorted(entries, key=age)
    expired = [entry for entry in ordered if now - entry.last_used > inactive and entry.digest not in keep]
    gone = {entry.digest for entry in expired}
    rest = [entry for entry in ordered if entry.digest not in gone]
    excess = excess_of(sum(entry.size for entry in rest), limit)
    return [entry.digest for entry in (*expired, *oldest(rest, excess, keep))]


def age(entry: Entry) -> tuple[float, str, str]:
    """The sort key for least recently used first; the same in each process, whatever the order they were found in."""
    return entry.last_used, entry.digest.algorithm, entry.digest.hex


def excess_of(total: int, limit: int) -> int:
    """Return how many of `total` bytes are to go: none up to `limit`, above it those over 95 % of it."""
    return total - int(limit * _FILL) if total > limit else 0


def oldest(entries: Iterable[Entry], excess: int, keep: Container[Digest]) -> Iterator[Entry]:
    """Yield entries in their order, less those in `keep`, until they have `excess` bytes."""
    for entry in entries:
        if excess <= 0:
            return
        if entry.digest not in keep:
            excess -= entry.size
            yield entry
