"""How full the cache is: an index, in memory, of what lies on disk, so that no request has to walk the tree."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from attrs import define, evolve, field

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import Entry, age, choose, excess_of, oldest


class DoesNotFit(Exception):
    """More bytes than the cache may have, beside what is in use."""


@define
class Usage:
    """The contents of a cache of at most `limit` bytes, least recently used first.

    Whoever is about to write a content adds it, with the size it will have, and pins it: that reserves the bytes.
    What is chosen to go is forgotten here at once, so that two who need room are not given the same bytes; the caller
    removes it from disk.
    """

    limit: int
    total: int = field(default=0, init=False)
    _entries: OrderedDict[Digest, Entry] = field(factory=OrderedDict, init=False)
    _pins: dict[Digest, int] = field(factory=dict, init=False)

    def load(self, entries: Iterable[Entry]) -> None:
        """Take over what was found on disk. What is pinned stays, found or not: it is on its way there."""
        known = self._entries
        found = {entry.digest: entry for entry in entries}
        for digest in self._pins:
            if digest in known:
                found[digest] = known[digest]
        for digest, entry in found.items():
            # The disk notes a use once a minute only.
            if digest in known and known[digest].last_used > entry.last_used:
                found[digest] = evolve(entry, last_used=known[digest].last_used)
        self._entries = OrderedDict((entry.digest, entry) for entry in sorted(found.values(), key=age))
        self.total = sum(entry.size for entry in found.values())

    def add(self, digest: Digest, size: int, now: float) -> None:
        """Count a content of `size` bytes, used now; in place of what was known of it."""
        self.remove(digest)
        self._entries[digest] = Entry(digest, size, now)
        self.total += size

    def touch(self, digest: Digest, now: float) -> None:
        """Note that a content is used now; nothing where it is not known."""
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries[digest] = Entry(digest, entry.size, now)
            self._entries.move_to_end(digest)

    def remove(self, digest: Digest) -> None:
        """Count a content no longer; nothing where it is not known. Its pins stay: who holds them gives them back."""
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self.total -= entry.size

    def pin(self, digest: Digest) -> None:
        """Keep a content from being chosen until `unpin` was called as often."""
        self._pins[digest] = self._pins.get(digest, 0) + 1

    def unpin(self, digest: Digest) -> None:
        """Take back one `pin`; raise `KeyError` where there is none."""
        count = self._pins[digest] - 1
        if count:
            self._pins[digest] = count
        else:
            del self._pins[digest]

    def make_room(self, wanted: int) -> list[Digest]:
        """Return what to remove so that `wanted` more bytes fit, least recently used first; nothing where they do.

        Raise `DoesNotFit`, and choose nothing, where they cannot fit beside what is pinned.
        """
        excess = self.total + wanted - self.limit
        if excess <= 0:
            return []
        # Down to 95 % as `choose` does, unless `wanted` and what is pinned alone have more than that.
        for target in (excess_of(self.total + wanted, self.limit), excess):
            chosen = list(oldest(self._entries.values(), target, self._pins))
            if sum(entry.size for entry in chosen) >= target:
                return self._forget([entry.digest for entry in chosen])
        raise DoesNotFit(f"{wanted} bytes do not fit in {self.limit} beside what is in use")

    def expire(self, inactive: float, now: float) -> list[Digest]:
        """Return what to remove because it was not used for `inactive` seconds, or because `limit` is passed."""
        entries = self._entries.values()
        return self._forget(choose(entries, limit=self.limit, inactive=inactive, now=now, keep=self._pins))

    def _forget(self, digests: list[Digest]) -> list[Digest]:
        for digest in digests:
            self.remove(digest)
        return digests
