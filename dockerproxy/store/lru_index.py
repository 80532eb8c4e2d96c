"""In-memory index of the cached blobs and partial downloads by last use. It saves requests from walking the tree.

Its methods run in the reactor's thread, and take no longer if the cache is larger. Only a `Rescan` runs in a thread.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from attrs import define, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import (
    BATCH_SIZE,
    CacheKey,
    Entry,
    LRUEntry,
    excess_bytes,
    inactive_since,
    least_recently_used,
    parse_key,
)
from dockerproxy.store.layout import IngestKey

_RUN_LENGTH = 1000  # entries sorted in one step, which takes 1 ms
_YIELD_EVERY = 100  # entries handled in one step


class CacheFull(Exception):
    """The requested bytes do not fit into the cache beside the blobs in use."""


@define
class LRUIndex:
    """The blobs and partial downloads of a cache of at most `limit` bytes, least recently used first.

    To reserve the bytes of a download, add it with its expected size and pin it. Evicted blobs are
    removed from the index at once, so that two callers never get the same bytes. The caller deletes them from disk.
    """

    limit: int
    total: int = field(default=0, init=False)
    overhead: int = field(default=0, init=False)
    """Bytes of other files that count towards `limit`."""
    _entries: OrderedDict[str, LRUEntry] = field(factory=OrderedDict, init=False)  # by `str(key)`
    _pins: dict[str, int] = field(factory=dict, init=False)
    # Keys changed since the running rescan began; None if no rescan is running.
    _dirty: dict[str, None] | None = field(default=None, init=False)

    def add(self, key: CacheKey, size: int, now: float) -> None:
        """Add a blob of `size` bytes that is used now, replacing its old entry."""
        self.remove(key)
        self._entries[str(key)] = size, now
        self.total += size

    def __contains__(self, key: CacheKey) -> bool:
        return str(key) in self._entries

    def touch(self, key: CacheKey, now: float) -> None:
        """Record a use of the blob. Does nothing if the blob is not in the index."""
        text = self._mark_dirty(key)
        if text in self._entries:
            self._entries[text] = self._entries[text][0], now
            self._entries.move_to_end(text)

    def size(self, key: CacheKey) -> int:
        """Return the bytes that count for `key`; 0 if it is not in the index."""
        return self._entries.get(str(key), (0, 0.0))[0]

    def remove(self, key: CacheKey) -> None:
        """Remove the blob, if it is in the index. Its pins stay until they are released by `unpin`."""
        entry = self._entries.pop(self._mark_dirty(key), None)
        if entry is not None:
            self.total -= entry[0]

    def pin(self, key: CacheKey) -> None:
        """Protect the blob from eviction until `unpin` has been called as often as `pin`."""
        text = self._mark_dirty(key)
        self._pins[text] = self._pins.get(text, 0) + 1

    def unpin(self, key: CacheKey) -> None:
        """Undo one `pin`. Raises `KeyError` if the blob is not pinned."""
        text = self._mark_dirty(key)
        count = self._pins[text] - 1
        if count:
            self._pins[text] = count
        else:
            del self._pins[text]

    @property
    def free(self) -> int:
        """The bytes that fit without an eviction."""
        return self.limit - self.total - self.overhead

    def evict(self, size: int) -> list[CacheKey]:
        """Remove and return the blobs to evict so that `size` more bytes fit, least recently used first.

        Raises `CacheFull`, and removes nothing, if the bytes do not fit beside the pinned blobs.
        """
        minimum = size - self.free
        if minimum <= 0:
            return []
        evictable = self._evictable_bytes()
        if evictable < minimum:
            in_use = self.total + self.overhead - evictable
            raise CacheFull(f"{size} bytes do not fit into a cache of {self.limit} bytes with {in_use} bytes in use")
        # Evict down to 95 %, unless `size` and the pinned blobs alone exceed that.
        target = excess_bytes(self.total + self.overhead + size, self.limit)
        return self._remove_all(
            least_recently_used(self._entries, self._pins, minimum, target if target <= evictable else minimum)
        )

    def expire(self, inactive: float, now: float) -> list[CacheKey]:
        """Remove and return blobs that were not used for `inactive` seconds, or that exceed `limit`.

        This handles one batch. Call it again until it returns an empty list.
        """
        expired = self._remove_all(inactive_since(self._entries, self._pins, now - inactive))
        excess = excess_bytes(self.total + self.overhead, self.limit)
        if len(expired) < BATCH_SIZE and excess > 0:
            expired += self._remove_all(least_recently_used(self._entries, self._pins, 0, excess))
        return expired

    def evict_count(self, count: int) -> list[CacheKey]:
        """Remove and return `count` blobs, but at most one batch, least recently used first."""
        unpinned = (key for key in self._entries if key not in self._pins)
        return self._remove_all(islice(unpinned, min(count, BATCH_SIZE)))

    def start_rescan(self) -> Rescan:
        """Begin to rebuild the index from disk. End the rescan with `apply_rescan` or `abort_rescan`."""
        self._dirty = {}
        return Rescan(self._entries, self._pins)

    def apply_rescan(self, rescan: Rescan) -> None:
        """Replace the entries by those of the rescan.

        Keep the current entries of blobs that changed since the rescan began, because it may have seen the old state.
        """
        entries, total = rescan.entries, rescan.total
        for key in self._dirty or ():
            total -= entries.pop(key, (0, 0.0))[0]
            if key in self._entries:
                entries[key] = self._entries[key]
                total += entries[key][0]
        rescan.entries, self._entries, self.total = self._entries, entries, total
        self._dirty = None

    def abort_rescan(self) -> None:
        """End a rescan that failed. Does nothing if none is running."""
        self._dirty = None

    def _mark_dirty(self, key: CacheKey) -> str:
        text = str(key)
        if self._dirty is not None:
            self._dirty.pop(text, None)
            self._dirty[text] = None
        return text

    def _evictable_bytes(self) -> int:
        return self.total - sum(self._entries[key][0] for key in self._pins if key in self._entries)

    def _remove_all(self, texts: Iterable[str]) -> list[CacheKey]:
        keys = [parse_key(text) for text in list(texts)]
        for key in keys:
            self.remove(key)
        return keys


@define
class Rescan:
    """The blobs found on disk, to replace the entries of an `LRUIndex`. Reads, but does not change, that index.

    It runs in a thread, in short steps, because sorting 100,000 entries at once would block the whole process.
    """

    _current: OrderedDict[str, LRUEntry]
    _pins: dict[str, int]
    entries: OrderedDict[str, LRUEntry] = field(factory=OrderedDict, init=False)
    total: int = field(default=0, init=False)
    _runs: list[list[tuple[float, str, int]]] = field(factory=lambda: [[]], init=False)

    def add(self, entry: Entry[Digest] | Entry[IngestKey]) -> None:
        """Add a blob found on disk. A pinned blob keeps its current entry, because it may still be downloading."""
        key = str(entry.key)
        current = self._current.get(key)
        if current is None:
            self._append(key, entry.size, entry.last_used)
        elif key not in self._pins:
            # The mtime on disk is updated only once a minute.
            self._append(key, entry.size, max(entry.last_used, current[1]))

    def sort(self) -> Iterator[None]:
        """Sort the entries by last use, the least recent first, in short steps."""
        for key in list(self._pins):
            current = self._current.get(key)
            if current is not None:
                self._append(key, *current)
        self._runs[-1].sort()
        for count, (last_used, key, size) in enumerate(heapq.merge(*self._runs)):
            self.total += size - self.entries.pop(key, (0, 0.0))[0]
            self.entries[key] = size, last_used
            if count % _YIELD_EVERY == 0:
                yield None
        for run in self._runs:
            run.clear()
            yield None

    def clear_incrementally(self) -> Iterator[None]:
        """Free the replaced entries in short steps. Freeing 100,000 at once would take 10 ms."""
        while self.entries:
            for _ in range(min(_YIELD_EVERY, len(self.entries))):
                self.entries.popitem()
            yield None

    def _append(self, key: str, size: int, last_used: float) -> None:
        run = self._runs[-1]
        run.append((last_used, key, size))
        if len(run) == _RUN_LENGTH:
            run.sort()
            self._runs.append([])
