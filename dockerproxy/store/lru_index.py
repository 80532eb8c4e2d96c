"""How full the cache is: an index, in memory, of what lies on disk, so that no request has to walk the tree.

All this is done in the reactor's thread, and takes no longer with a large cache; but a `Recount`, which is made in a
thread.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from attrs import define, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import BATCH_SIZE, Entry, LRUEntry, excess_bytes, inactive_since, least_recently_used

_RUN_LENGTH = 1000  # contents that are sorted in one go: 1 ms
_YIELD_EVERY = 100  # contents that are looked at in one step


class CacheFull(Exception):
    """More bytes than the cache may have, beside what is in use."""


@define
class LRUIndex:
    """The contents of a cache of at most `limit` bytes, least recently used first.

    Whoever is about to write a content adds it, with the size it will have, and pins it: that reserves the bytes.
    What is chosen to go is forgotten here at once, so that two who need room are not given the same bytes; the caller
    removes it from disk.
    """

    limit: int
    total: int = field(default=0, init=False)
    _entries: OrderedDict[str, LRUEntry] = field(factory=OrderedDict, init=False)  # by digests as text (see `Known`)
    _pins: dict[str, int] = field(factory=dict, init=False)
    _dirty: dict[str, None] | None = field(default=None, init=False)  # since the recount began, where one is made

    def add(self, digest: Digest, size: int, now: float) -> None:
        """Count a content of `size` bytes, used now; in place of what was known of it."""
        self.remove(digest)
        self._entries[str(digest)] = size, now
        self.total += size

    def touch(self, digest: Digest, now: float) -> None:
        """Note that a content is used now; nothing where it is not known."""
        key = self._mark_dirty(digest)
        if key in self._entries:
            self._entries[key] = self._entries[key][0], now
            self._entries.move_to_end(key)

    def remove(self, digest: Digest) -> None:
        """Count a content no longer; nothing where it is not known. Its pins stay: who holds them gives them back."""
        entry = self._entries.pop(self._mark_dirty(digest), None)
        if entry is not None:
            self.total -= entry[0]

    def pin(self, digest: Digest) -> None:
        """Keep a content from being chosen until `unpin` was called as often."""
        key = self._mark_dirty(digest)
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, digest: Digest) -> None:
        """Take back one `pin`; raise `KeyError` where there is none."""
        key = self._mark_dirty(digest)
        count = self._pins[key] - 1
        if count:
            self._pins[key] = count
        else:
            del self._pins[key]

    def evict(self, size: int) -> list[Digest]:
        """Return what to remove so that `wanted` more bytes fit, least recently used first; nothing where they do.

        Raise `DoesNotFit`, and choose nothing, where they cannot fit beside what is pinned.
        """
        minimum = self.total + size - self.limit
        if minimum <= 0:
            return []
        evictable = self._evictable_bytes()
        if evictable < minimum:
            raise CacheFull(f"{size} bytes do not fit in {self.limit} beside what is in use")
        # Down to 95 %, unless `wanted` and what is pinned alone have more than that.
        target = excess_bytes(self.total + size, self.limit)
        return self._remove_all(
            least_recently_used(self._entries, self._pins, minimum, target if target <= evictable else minimum)
        )

    def expire(self, inactive: float, now: float) -> list[Digest]:
        """Return what to remove because it was not used for `inactive` seconds, or because `limit` is passed.

        There may be more of it, unless there is nothing.
        """
        expired = self._remove_all(inactive_since(self._entries, self._pins, now - inactive))
        excess = excess_bytes(self.total, self.limit)
        if len(expired) < BATCH_SIZE and excess > 0:
            expired += self._remove_all(least_recently_used(self._entries, self._pins, 0, excess))
        return expired

    def start_rescan(self) -> Rescan:
        """Begin to count anew, by what is on disk; `adopt` ends that, or `give_up`."""
        self._dirty = {}
        return Rescan(self._entries, self._pins)

    def apply_rescan(self, rescan: Rescan) -> None:
        """Go on with what was counted, but for what changed here meanwhile: it may have been seen as it was before."""
        entries, total = rescan.entries, rescan.total
        for key in self._dirty or ():
            total -= entries.pop(key, (0, 0.0))[0]
            if key in self._entries:
                entries[key] = self._entries[key]
                total += entries[key][0]
        rescan.entries, self._entries, self.total = self._entries, entries, total
        self._dirty = None

    def abort_rescan(self) -> None:
        """End a recount that did not work out; nothing where none is made."""
        self._dirty = None

    def _mark_dirty(self, digest: Digest) -> str:
        key = str(digest)
        if self._dirty is not None:
            self._dirty.pop(key, None)
            self._dirty[key] = None
        return key

    def _evictable_bytes(self) -> int:
        return self.total - sum(self._entries[text][0] for text in self._pins if text in self._entries)

    def _remove_all(self, keys: Iterable[str]) -> list[Digest]:
        digests = [Digest.parse(text) for text in list(keys)]
        for digest in digests:
            self.remove(digest)
        return digests


@define
class Rescan:
    """What is found on disk, for a `Usage` that `known` and `pins` are of: it is only looked at, a content at a time.

    For a thread; a moment's work at a time, for to sort 100,000 in one go would hold the whole process.
    """

    _current: OrderedDict[str, LRUEntry]
    _pins: dict[str, int]
    entries: OrderedDict[str, LRUEntry] = field(factory=OrderedDict, init=False)
    total: int = field(default=0, init=False)
    _runs: list[list[tuple[float, str, int]]] = field(factory=lambda: [[]], init=False)

    def add(self, entry: Entry) -> None:
        """Count a content. What is pinned stays as it is known, found or not: it is on its way there."""
        key = str(entry.digest)
        current = self._current.get(key)
        if current is None:
            self._append(key, entry.size, entry.last_used)
        elif key not in self._pins:
            # The disk notes a use once a minute only.
            self._append(key, entry.size, max(entry.last_used, current[1]))

    def sort(self) -> Iterator[None]:
        """Put what was found in order, least recently used first; some at a time."""
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
        """Free what was known before; some at a time, as all at once would take 10 ms for 100,000."""
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
