"""Eviction policy of the cache: a segmented LRU (Karedla et al. 1994) with shares. Pure.

Blobs that were used once and blobs that were used again have a segment each. Those that were used once leave first, the
least recently used before others, as long as they take more than an eighth of the cache. So whoever requests ever new
blobs replaces his own, and not those that others use again and again.

In each segment, one client and one registry have a share: if what one client has brought into the cache is more than
half of the segment, its least recently used blobs leave before those of others. So not even a client that requests each
blob twice can take the whole cache.

In a fleet, copies of blobs that another member owns leave before all others, so that together the members keep more.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from itertools import islice
from sys import intern
from typing import Generic, TypeVar

from attrs import define, field, frozen

from dockerproxy.oci.names import Digest
from dockerproxy.store.layout import IngestKey

# Evict a little more than needed, so that the next blobs fit without another eviction.
_LOW_WATERMARK = 0.95

_ONCE_PARTS = 8  # blobs that were used once keep one part in so many of the cache

BATCH_SIZE = 500
"""Blobs chosen per call, unless more are needed. Choosing them and removing them from the index takes 1 to 2 ms."""

COPY_AGE = 600.0
"""Seconds since its last use after which a copy of another member's blob leaves first."""

_MAX_SCANNED = 500  # entries of a segment in which copies are looked for; with a hundred members it takes 40 ms

K = TypeVar("K", Digest, IngestKey)

CacheKey = Digest | IngestKey
"""A key of something in the cache: a blob, or a partial download."""

LRUEntry = tuple[int, float, str, str]
"""A blob's size in bytes, the time of its last read or write (POSIX time), and the client and registry that brought it.

Client and registry are `""` if they are not known, because the blob is older than the process.

This is a plain tuple, unlike `Entry`, because Python's garbage collector untracks tuples of numbers when it first sees
them. It stops the whole process while it looks at tracked objects.
"""


@frozen(slots=True)
class Entry(Generic[K]):
    """A cached blob or partial download: its size in bytes, and when it was last read or written (POSIX time).

    `used_again` says whether anybody requested a blob after the request that brought it.
    """

    key: K
    size: int
    last_used: float
    used_again: bool = False


def inactive_since(entries: Mapping[str, LRUEntry], pins: Container[str], since: float) -> Iterator[str]:
    """Yield at most `BATCH_SIZE` unpinned keys that were last used before `since`.

    `entries` is ordered by last use, the least recent first.
    """
    count = 0
    for key, entry in entries.items():
        if entry[1] >= since or count == BATCH_SIZE:
            return
        if key not in pins:
            count += 1
            yield key


@define
class Segment:
    """The blobs of one segment, least recently used first, and the bytes that each client and registry has there."""

    entries: OrderedDict[str, LRUEntry] = field(factory=OrderedDict, init=False)  # by `str(key)`
    total: int = field(default=0, init=False)
    by_client: Counter[str] = field(factory=Counter, init=False)
    by_registry: Counter[str] = field(factory=Counter, init=False)

    def add(self, text: str, entry: LRUEntry) -> None:
        """Add an entry that is not there yet, as the most recently used one."""
        size, last_used, client, registry = entry
        self.entries[text] = size, last_used, intern(client), intern(registry)
        self._count(entry, size)

    def pop(self, text: str) -> LRUEntry | None:
        """Remove and return the entry; return None if it is not there."""
        entry = self.entries.pop(text, None)
        if entry is not None:
            self._count(entry, -entry[0])
        return entry

    def _count(self, entry: LRUEntry, size: int) -> None:
        self.total += size
        for held, owner in ((self.by_client, entry[2]), (self.by_registry, entry[3])):
            held[owner] += size
            if not held[owner]:
                del held[owner]

    def order(self, pins: Container[str]) -> Iterator[str]:
        """Yield the unpinned keys in the order in which they leave.

        While a client or a registry has more than half of the bytes, its blobs leave, and then the rest. If there are a
        client and a registry with more than half, the blobs that this client brought from this registry leave first.
        To find its blobs behind 100,000 older ones of others takes 15 ms, once for each batch that is evicted.
        """
        client, registry = _greediest(self.by_client), _greediest(self.by_registry)
        chosen: set[str] = set()
        total, held_by_client, held_by_registry = self.total, self.by_client[client], self.by_registry[registry]
        for of_client, of_registry in ((True, True), (True, False), (False, True)):
            if (of_client and not client) or (of_registry and not registry):
                continue
            for text, entry in self._entries_of(client if of_client else "", registry if of_registry else ""):
                if (of_client and held_by_client * 2 <= total) or (of_registry and held_by_registry * 2 <= total):
                    break
                if text not in pins and text not in chosen:
                    chosen.add(text)
                    total -= entry[0]
                    held_by_client -= entry[0] if entry[2] == client else 0
                    held_by_registry -= entry[0] if entry[3] == registry else 0
                    yield text
        for text in self.entries:
            if text not in pins and text not in chosen:
                yield text

    def _entries_of(self, client: str, registry: str) -> Iterator[tuple[str, LRUEntry]]:
        """Return the entries of one client from one registry, or of either if the other is `""`."""
        items = self.entries.items()
        if client and registry:
            return (item for item in items if item[1][2] == client and item[1][3] == registry)
        if client:
            return (item for item in items if item[1][2] == client)
        return (item for item in items if item[1][3] == registry)


def _greediest(held: Counter[str]) -> str:
    """Return the known owner that has most; `""` if there is none."""
    return max((owner for owner in held if owner), key=held.__getitem__, default="")


def order_of_copies(
    segments: Iterable[Segment], pins: Container[str], is_copy: Callable[[str, LRUEntry], bool]
) -> Iterator[str]:
    """Yield those of the least recently used blobs that are copies, unless they are pinned."""
    for segment in segments:
        for text, entry in islice(segment.entries.items(), _MAX_SCANNED):
            if text not in pins and "/" not in text and is_copy(text, entry):
                yield text


def order_of_excess(once: Segment, pins: Container[str], limit: int) -> Iterator[str]:
    """Yield the unpinned keys that were used once, as long as they take more than an eighth of `limit` bytes."""
    held = once.total
    for text in once.order(pins):
        if held <= limit // _ONCE_PARTS:
            return
        held -= once.entries[text][0]
        yield text


def order_of_rest(once: Segment, again: Segment, pins: Container[str]) -> Iterator[str]:
    """Yield all unpinned keys in the order in which they leave if there is no excess of those used once."""
    yield from again.order(pins)
    yield from once.order(pins)


def first_keys(order: Iterable[tuple[str, int]], minimum: int, target: int, entry_cost: int = 0) -> Iterator[str]:
    """Yield the first keys of `order`, which has keys and sizes, until their blobs have `target` bytes.

    Each counts `entry_cost` more than its size. After `BATCH_SIZE` keys, stop as soon as they have `minimum` bytes.
    """
    count = freed_bytes = 0
    for key, size in order:
        if freed_bytes >= (target if count < BATCH_SIZE else minimum):
            return
        count, freed_bytes = count + 1, freed_bytes + size + entry_cost
        yield key


def parse_key(text: str) -> CacheKey:
    """Return the key whose `str` is `text`."""
    return IngestKey.parse(text) if "/" in text else Digest.parse(text)


def excess_bytes(total: int, limit: int) -> int:
    """Return the bytes to evict: 0 if `total` is at most `limit`, otherwise those above 95 % of `limit`."""
    return total - int(limit * _LOW_WATERMARK) if total > limit else 0
