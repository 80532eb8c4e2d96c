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
class Partials:
    """The bytes of partial downloads by host and `str(key)`, in the order of their last changes."""

    _sizes: dict[str, dict[str, int]] = field(factory=dict, init=False)

    def add(self, text: str, size: int) -> None:
        """Add the entry `text`, unless it is a blob."""
        if "/" in text:
            self._sizes.setdefault(text.partition("/")[0], {})[text] = size

    def remove(self, text: str) -> None:
        """Remove the entry, if it is there."""
        host = text.partition("/")[0]
        sizes = self._sizes.get(host)
        if sizes is not None:
            sizes.pop(text, None)
            if not sizes:
                del self._sizes[host]

    def items(self, host: str | None = None) -> Iterator[tuple[str, int]]:
        """Yield the keys and sizes of those from `host` or from all, host by host, the least recently changed first."""
        for sizes in self._of(host):
            yield from sizes.items()

    def total(self, host: str | None = None) -> int:
        """Return the bytes of those from `host` or from all."""
        return sum(sum(sizes.values()) for sizes in self._of(host))

    def count(self, host: str) -> int:
        """Return the number of those from `host`."""
        return len(self._sizes.get(host, ()))

    def _of(self, host: str | None) -> Iterable[dict[str, int]]:
        return self._sizes.values() if host is None else [self._sizes.get(host, {})]


@define
class LRUIndex:
    """The blobs and partial downloads of a cache of at most `limit` bytes, least recently used first.

    To reserve the bytes of a download, add it with the reserved size and pin it. Evicted blobs are
    removed from the index at once, so that two callers never get the same bytes. The caller deletes them from disk.
    """

    limit: int
    entry_cost: int = 0
    """Bytes that each entry counts beside its size, because its file takes whole blocks and a directory."""
    total: int = field(default=0, init=False)
    overhead: int = field(default=0, init=False)
    """Bytes of other files that count towards `limit`."""
    partials: Partials = field(factory=Partials, init=False)
    _entries: OrderedDict[str, LRUEntry] = field(factory=OrderedDict, init=False)  # by `str(key)`
    _pins: dict[str, int] = field(factory=dict, init=False)
    # Keys changed since the running rescan began; None if no rescan is running.
    _dirty: dict[str, None] | None = field(default=None, init=False)

    def add(self, key: CacheKey, size: int, now: float) -> None:
        """Add a blob of `size` bytes that is used now, replacing its old entry."""
        self.remove(key)
        text = str(key)
        self._entries[text] = size, now
        self.partials.add(text, size)
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
        text = self._mark_dirty(key)
        entry = self._entries.pop(text, None)
        if entry is not None:
            self.partials.remove(text)
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
    def used(self) -> int:
        """The bytes that count towards `limit`."""
        return self.total + self.overhead + self.entry_cost * len(self._entries)

    @property
    def free(self) -> int:
        """The bytes that fit without an eviction."""
        return self.limit - self.used

    @property
    def evictable(self) -> int:
        """The bytes that evictions could free."""
        pinned = [self._entries[key][0] for key in self._pins if key in self._entries]
        return self.total - sum(pinned) + self.entry_cost * (len(self._entries) - len(pinned))

    def partial_bytes(self, host: str | None = None) -> int:
        """The bytes of partial downloads, reserved or on disk, from `host` or from all."""
        return self.partials.total(host)

    def reserved_bytes(self, host: str | None = None) -> int:
        """The bytes of pinned partial downloads from `host` or from all."""
        prefix = "" if host is None else f"{host}/"
        pinned = (text for text in self._pins if "/" in text and text.startswith(prefix))
        return sum(self._entries[text][0] for text in pinned if text in self._entries)

    def evict_partials(self, size: int, host: str | None = None, count: int = 0) -> list[CacheKey]:
        """Remove and return partial downloads that are not pinned, from `host` or from all.

        Those of each host go in the order of their last changes, until `size` bytes and at least `count` have gone.
        """
        chosen: list[str] = []
        for text, partial_size in self.partials.items(host):
            if size <= 0 and len(chosen) >= count:
                break
            if text not in self._pins:
                chosen.append(text)
                size -= partial_size
        return self._remove_all(chosen)

    def evict(self, size: int) -> list[CacheKey]:
        """Remove and return the blobs to evict so that `size` more bytes fit, least recently used first.

        Raises `CacheFull`, and removes nothing, if the bytes do not fit beside the pinned blobs.
        """
        minimum = size - self.free
        if minimum <= 0:
            return []
        evictable = self.evictable
        if evictable < minimum:
            in_use = self.used - evictable
            raise CacheFull(f"{size} bytes do not fit into a cache of {self.limit} bytes with {in_use} bytes in use")
        # Evict down to 95 %, unless `size` and the pinned blobs alone exceed that.
        target = excess_bytes(self.used + size, self.limit)
        return self._remove_least_recently_used(minimum, target if target <= evictable else minimum)

    def expire(self, inactive: float, now: float) -> list[CacheKey]:
        """Remove and return blobs that were not used for `inactive` seconds, or that exceed `limit`.

        This handles one batch. Call it again until it returns an empty list.
        """
        expired = self._remove_all(inactive_since(self._entries, self._pins, now - inactive))
        excess = excess_bytes(self.used, self.limit)
        if len(expired) < BATCH_SIZE and excess > 0:
            expired += self._remove_least_recently_used(0, excess)
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
        entries, partials, total = rescan.entries, rescan.partials, rescan.total
        for key in self._dirty or ():
            total -= entries.pop(key, (0, 0.0))[0]
            partials.remove(key)
            if key in self._entries:
                entries[key] = self._entries[key]
                partials.add(key, entries[key][0])
                total += entries[key][0]
        rescan.entries, self._entries, self.partials, self.total = self._entries, entries, partials, total
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

    def _remove_least_recently_used(self, minimum: int, target: int) -> list[CacheKey]:
        return self._remove_all(least_recently_used(self._entries, self._pins, minimum, target, self.entry_cost))

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
    partials: Partials = field(factory=Partials, init=False)
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
            self.partials.add(key, size)
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
