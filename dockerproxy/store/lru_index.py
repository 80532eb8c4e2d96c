"""In-memory index of the cached blobs and partial downloads by last use. It saves requests from walking the tree.

Its methods run in the reactor's thread, and take no longer if the cache is larger. Only a `Rescan` runs in a thread.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from attrs import define, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import (
    BATCH_SIZE,
    CacheKey,
    Entry,
    LRUEntry,
    Segment,
    excess_bytes,
    first_keys,
    inactive_since,
    order_of_copies,
    order_of_excess,
    order_of_rest,
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
class Segments:
    """The entries of the cache: blobs that were used once, with all partial downloads, and blobs that were used again.

    A blob's first use is the request that brought it. Blobs that the administrator keeps are apart: they never leave,
    and count for no client or registry.
    """

    once: Segment = field(factory=Segment, init=False)
    again: Segment = field(factory=Segment, init=False)
    kept: Segment = field(factory=Segment, init=False)

    @property
    def total(self) -> int:
        """The bytes of all entries."""
        return self.once.total + self.again.total + self.kept.total

    def __len__(self) -> int:
        return len(self.once.entries) + len(self.again.entries) + len(self.kept.entries)

    def get(self, text: str) -> LRUEntry | None:
        """Return the entry, or None if it is not there."""
        return self.once.entries.get(text) or self.again.entries.get(text) or self.kept.entries.get(text)

    def pairs(self, other: Segments) -> tuple[tuple[Segment, Segment], ...]:
        """Return each segment with that of `other`."""
        return (self.once, other.once), (self.again, other.again), (self.kept, other.kept)

    def pop(self, text: str) -> LRUEntry | None:
        """Remove and return the entry; return None if it is not there."""
        return self.once.pop(text) or self.again.pop(text) or self.kept.pop(text)


@define
class LRUIndex:
    """The blobs and partial downloads of a cache of at most `limit` bytes, and their users.

    To reserve the bytes of a download, add it with the reserved size and pin it. Evicted blobs are
    removed from the index at once, so that two callers never get the same bytes. The caller deletes them from disk.
    """

    limit: int
    entry_cost: int = 0
    """Bytes that each entry counts beside its size, because its file takes whole blocks and a directory."""
    overhead: int = field(default=0, init=False)
    """Bytes of other files that count towards `limit`."""
    partials: Partials = field(factory=Partials, init=False)
    _segments: Segments = field(factory=Segments, init=False)
    _is_copy: Callable[[str, LRUEntry], bool] | None = field(default=None, init=False)
    _pins: dict[str, int] = field(factory=dict, init=False)
    _kept: set[str] = field(factory=set, init=False)  # names of blobs, also of some that are not here
    _kept_since: float = field(default=0.0, init=False)
    # Keys changed since the running rescan began; None if no rescan is running.
    _dirty: dict[str, None] | None = field(default=None, init=False)

    @property
    def total(self) -> int:
        """The bytes of all blobs and partial downloads."""
        return self._segments.total

    def add(self, key: CacheKey, size: int, now: float, client: str = "", registry: str = "") -> bool:
        """Add a blob of `size` bytes, which `client` brings from `registry` now.

        If the blob is there already, this is another use; return whether it is the second one.
        """
        text = self._mark_dirty(key)
        is_kept = text in self._kept
        was_used_again = is_kept or text in self._segments.again.entries
        old = self._segments.pop(text)
        is_blob = "/" not in text
        if old is not None:
            self.partials.remove(text)
            client, registry = old[2] or client, old[3] or registry
        segments = self._segments
        segment = segments.kept if is_kept else segments.again if old is not None and is_blob else segments.once
        segment.add(text, (size, now, client, registry))
        self.partials.add(text, size)
        return old is not None and is_blob and not was_used_again

    def __contains__(self, key: CacheKey) -> bool:
        return self._segments.get(str(key)) is not None

    def touch(self, key: Digest, now: float) -> bool:
        """Record a use of the blob, if it is in the index. Return whether it is the second one."""
        text = self._mark_dirty(key)
        again = self._segments.again
        segment = self._segments.kept if text in self._kept else again
        entry = segment.entries.get(text)
        if entry is not None:
            segment.entries[text] = entry[0], now, entry[2], entry[3]
            segment.entries.move_to_end(text)
            return False
        entry = self._segments.once.pop(text)
        if entry is None:
            return False
        again.add(text, (entry[0], now, entry[2], entry[3]))
        return True

    def size(self, key: CacheKey) -> int:
        """Return the bytes that count for `key`; 0 if it is not in the index."""
        entry = self._segments.get(str(key))
        return 0 if entry is None else entry[0]

    def remove(self, key: CacheKey) -> None:
        """Remove the blob, if it is in the index. Its pins stay until they are released by `unpin`."""
        text = self._mark_dirty(key)
        if self._segments.pop(text) is not None:
            self.partials.remove(text)

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

    def keep(self, digests: Iterable[Digest], now: float) -> None:
        """Keep these blobs from now on whatever happens, also those that are not here yet."""
        for text in map(str, digests):
            self._kept.add(text)
            self._move(text, self._segments.kept, now)

    def stop_keeping(self, digests: Iterable[Digest], now: float) -> None:
        """Let these blobs leave again. They count as used now."""
        for text in map(str, digests):
            self._kept.discard(text)
            self._move(text, self._segments.again, now)

    def evict_first(self, is_copy: Callable[[str, LRUEntry], bool]) -> None:
        """Let the blobs of which `is_copy` is true leave first: in a fleet, another member has them, too."""
        self._is_copy = is_copy

    def _move(self, text: str, segment: Segment, now: float) -> None:
        self._kept_since = now
        entry = self._segments.pop(text)
        if entry is not None:
            segment.add(text, (entry[0], now, entry[2], entry[3]))

    @property
    def kept_bytes(self) -> int:
        """The bytes of the blobs that are kept, as they count towards `limit`."""
        return self._segments.kept.total + self.entry_cost * len(self._segments.kept.entries)

    @property
    def used(self) -> int:
        """The bytes that count towards `limit`."""
        return self.total + self.overhead + self.entry_cost * len(self._segments)

    @property
    def free(self) -> int:
        """The bytes that fit without an eviction."""
        return self.limit - self.used

    @property
    def evictable(self) -> int:
        """The bytes that evictions could free."""
        once, again = self._segments.once, self._segments.again
        pinned = [
            entry[0] for text in self._pins if (entry := once.entries.get(text) or again.entries.get(text)) is not None
        ]
        count = len(once.entries) + len(again.entries) - len(pinned)
        return once.total + again.total - sum(pinned) + self.entry_cost * count

    def held_bytes(self) -> tuple[Counter[str], Counter[str]]:
        """Return the bytes that each client, and each registry, has brought. Those of unknown ones count for `""`."""
        once, again = self._segments.once, self._segments.again
        return once.by_client + again.by_client, once.by_registry + again.by_registry

    def partial_bytes(self, host: str | None = None) -> int:
        """The bytes of partial downloads, reserved or on disk, from `host` or from all."""
        return self.partials.total(host)

    def reserved_bytes(self, host: str | None = None) -> int:
        """The bytes of pinned partial downloads from `host` or from all."""
        prefix = "" if host is None else f"{host}/"
        pinned = (self._segments.get(text) for text in self._pins if "/" in text and text.startswith(prefix))
        return sum(entry[0] for entry in pinned if entry is not None)

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
        """Remove and return the blobs to evict so that `size` more bytes fit (see `eviction`).

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
        return self._free_space(size, minimum, target if target <= evictable else minimum)

    def expire(self, inactive: float, now: float) -> list[CacheKey]:
        """Remove and return blobs that were not used for `inactive` seconds, or that exceed `limit`.

        This handles one batch. Call it again until it returns an empty list.
        """
        since, segments = now - inactive, self._segments
        expired = self._remove_all(inactive_since(segments.once.entries, self._pins, since))
        if len(expired) < BATCH_SIZE:
            expired += self._remove_all(inactive_since(segments.again.entries, self._pins, since))
        excess = excess_bytes(self.used, self.limit)
        if len(expired) < BATCH_SIZE and excess > 0:
            expired += self._free_space(0, 0, excess)
        return expired

    def evict_count(self, count: int) -> list[CacheKey]:
        """Remove and return `count` blobs, but at most one batch. Those that were used once go first."""
        count, segments = min(count, BATCH_SIZE), self._segments
        removed = self._remove_all(islice(order_of_excess(segments.once, self._pins, self.limit), count))
        rest = order_of_rest(segments.once, segments.again, self._pins)
        return removed + self._remove_all(islice(rest, count - len(removed)))

    def start_rescan(self) -> Rescan:
        """Begin to rebuild the index from disk. End the rescan with `apply_rescan` or `abort_rescan`."""
        self._dirty = {}
        return Rescan(self._segments, self._pins, frozenset(self._kept))

    def apply_rescan(self, rescan: Rescan) -> None:
        """Replace the entries by those of the rescan.

        Keep the current entries of blobs that changed since the rescan began, because it may have seen the old state.
        """
        found = rescan.segments
        for key in self._dirty or ():
            found.pop(key)
            rescan.partials.remove(key)
            for current, new in self._segments.pairs(found):
                entry = current.entries.get(key)
                if entry is not None:
                    new.add(key, entry)
                    rescan.partials.add(key, entry[0])
        for key in self._kept ^ rescan.kept:  # those that changed meanwhile
            entry = found.pop(key)
            if entry is not None:
                segment = found.kept if key in self._kept else found.again
                segment.add(key, (entry[0], self._kept_since, entry[2], entry[3]))
        rescan.segments, self._segments, self.partials = self._segments, found, rescan.partials
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

    def _free_space(self, needed: int, minimum: int, target: int) -> list[CacheKey]:
        """Remove and return blobs of `target` bytes; of `minimum` bytes if a batch has less.

        Beyond the excess of blobs that were used once, do so only if `needed` bytes would not be free otherwise.
        """
        segments, used = self._segments, self.used
        removed: list[CacheKey] = []
        if self._is_copy is not None:
            copies = list(order_of_copies((segments.once, segments.again), self._pins, self._is_copy))
            removed = self._remove_first(iter(copies), minimum, target)
            minimum, target = minimum - (used - self.used), target - (used - self.used)
            used = self.used
        removed += self._remove_first(order_of_excess(segments.once, self._pins, self.limit), minimum, target)
        freed = used - self.used
        if self.free < needed and (len(removed) < BATCH_SIZE or freed < minimum):
            rest = order_of_rest(segments.once, segments.again, self._pins)
            removed += self._remove_first(rest, minimum - freed, target - freed)
        return removed

    def _remove_first(self, order: Iterator[str], minimum: int, target: int) -> list[CacheKey]:
        sizes = ((text, entry[0]) for text in order if (entry := self._segments.get(text)) is not None)
        return self._remove_all(first_keys(sizes, minimum, target, self.entry_cost))

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

    _current: Segments
    _pins: dict[str, int]
    kept: frozenset[str]
    segments: Segments = field(factory=Segments, init=False)
    partials: Partials = field(factory=Partials, init=False)
    _runs: list[list[tuple[float, str, int, str, str, bool]]] = field(factory=lambda: [[]], init=False)

    def add(self, entry: Entry[Digest] | Entry[IngestKey]) -> None:
        """Add a blob found on disk. A pinned blob keeps its current entry, because it may still be downloading."""
        key = str(entry.key)
        current = self._current.get(key)
        if current is None:
            self._append(key, (entry.size, entry.last_used, "", ""), entry.used_again)
        elif key not in self._pins:
            # The mtime on disk is updated only once a minute.
            merged = entry.size, max(entry.last_used, current[1]), current[2], current[3]
            self._append(key, merged, entry.used_again or key in self._current.again.entries)

    def sort(self) -> Iterator[None]:
        """Sort the entries by last use, the least recent first, in short steps."""
        for key in list(self._pins):
            current = self._current.get(key)
            if current is not None:
                self._append(key, current, key in self._current.again.entries)
        self._runs[-1].sort()
        segments = self.segments
        for count, (last_used, key, size, client, registry, used_again) in enumerate(heapq.merge(*self._runs)):
            segments.pop(key)
            segment = segments.kept if key in self.kept else segments.again if used_again else segments.once
            segment.add(key, (size, last_used, client, registry))
            self.partials.add(key, size)
            if count % _YIELD_EVERY == 0:
                yield None
        for run in self._runs:
            run.clear()
            yield None

    def clear_incrementally(self) -> Iterator[None]:
        """Free the replaced entries in short steps. Freeing 100,000 at once would take 10 ms."""
        for entries in (self.segments.once.entries, self.segments.again.entries, self.segments.kept.entries):
            while entries:
                for _ in range(min(_YIELD_EVERY, len(entries))):
                    entries.popitem()
                yield None

    def _append(self, key: str, entry: LRUEntry, used_again: bool) -> None:
        size, last_used, client, registry = entry
        run = self._runs[-1]
        run.append((last_used, key, size, client, registry, used_again))
        if len(run) == _RUN_LENGTH:
            run.sort()
            self._runs.append([])
