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
from dockerproxy.store.eviction import AT_ONCE, Entry, Known, excess_of, oldest, unused

_RUN = 1000  # contents that are sorted in one go: 1 ms
_SOME = 100  # contents that are looked at in one step


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
    _kept: OrderedDict[str, Known] = field(factory=OrderedDict, init=False)  # by digests as text (see `Known`)
    _pins: dict[str, int] = field(factory=dict, init=False)
    _changed: dict[str, None] | None = field(default=None, init=False)  # since the recount began, where one is made

    def add(self, digest: Digest, size: int, now: float) -> None:
        """Count a content of `size` bytes, used now; in place of what was known of it."""
        self.remove(digest)
        self._kept[str(digest)] = size, now
        self.total += size

    def touch(self, digest: Digest, now: float) -> None:
        """Note that a content is used now; nothing where it is not known."""
        text = self._note(digest)
        if text in self._kept:
            self._kept[text] = self._kept[text][0], now
            self._kept.move_to_end(text)

    def remove(self, digest: Digest) -> None:
        """Count a content no longer; nothing where it is not known. Its pins stay: who holds them gives them back."""
        known = self._kept.pop(self._note(digest), None)
        if known is not None:
            self.total -= known[0]

    def pin(self, digest: Digest) -> None:
        """Keep a content from being chosen until `unpin` was called as often."""
        text = self._note(digest)
        self._pins[text] = self._pins.get(text, 0) + 1

    def unpin(self, digest: Digest) -> None:
        """Take back one `pin`; raise `KeyError` where there is none."""
        text = self._note(digest)
        count = self._pins[text] - 1
        if count:
            self._pins[text] = count
        else:
            del self._pins[text]

    def make_room(self, wanted: int) -> list[Digest]:
        """Return what to remove so that `wanted` more bytes fit, least recently used first; nothing where they do.

        Raise `DoesNotFit`, and choose nothing, where they cannot fit beside what is pinned.
        """
        least = self.total + wanted - self.limit
        if least <= 0:
            return []
        free = self._free()
        if free < least:
            raise DoesNotFit(f"{wanted} bytes do not fit in {self.limit} beside what is in use")
        # Down to 95 %, unless `wanted` and what is pinned alone have more than that.
        enough = excess_of(self.total + wanted, self.limit)
        return self._forget(oldest(self._kept, self._pins, least, enough if enough <= free else least))

    def expire(self, inactive: float, now: float) -> list[Digest]:
        """Return what to remove because it was not used for `inactive` seconds, or because `limit` is passed.

        There may be more of it, unless there is nothing.
        """
        expired = self._forget(unused(self._kept, self._pins, now - inactive))
        excess = excess_of(self.total, self.limit)
        if len(expired) < AT_ONCE and excess > 0:
            expired += self._forget(oldest(self._kept, self._pins, 0, excess))
        return expired

    def recount(self) -> Recount:
        """Begin to count anew, by what is on disk; `adopt` ends that, or `give_up`."""
        self._changed = {}
        return Recount(self._kept, self._pins)

    def adopt(self, recount: Recount) -> None:
        """Go on with what was counted, but for what changed here meanwhile: it may have been seen as it was before."""
        kept, total = recount.kept, recount.total
        for text in self._changed or ():
            total -= kept.pop(text, (0, 0.0))[0]
            if text in self._kept:
                kept[text] = self._kept[text]
                total += kept[text][0]
        recount.kept, self._kept, self.total = self._kept, kept, total
        self._changed = None

    def give_up(self) -> None:
        """End a recount that did not work out; nothing where none is made."""
        self._changed = None

    def _note(self, digest: Digest) -> str:
        text = str(digest)
        if self._changed is not None:
            self._changed.pop(text, None)
            self._changed[text] = None
        return text

    def _free(self) -> int:
        return self.total - sum(self._kept[text][0] for text in self._pins if text in self._kept)

    def _forget(self, texts: Iterable[str]) -> list[Digest]:
        digests = [Digest.parse(text) for text in list(texts)]
        for digest in digests:
            self.remove(digest)
        return digests


@define
class Recount:
    """What is found on disk, for a `Usage` that `known` and `pins` are of: it is only looked at, a content at a time.

    For a thread; a moment's work at a time, for to sort 100,000 in one go would hold the whole process.
    """

    _known: OrderedDict[str, Known]
    _pins: dict[str, int]
    kept: OrderedDict[str, Known] = field(factory=OrderedDict, init=False)
    total: int = field(default=0, init=False)
    _runs: list[list[tuple[float, str, int]]] = field(factory=lambda: [[]], init=False)

    def add(self, entry: Entry) -> None:
        """Count a content. What is pinned stays as it is known, found or not: it is on its way there."""
        text = str(entry.digest)
        known = self._known.get(text)
        if known is None:
            self._append(text, entry.size, entry.last_used)
        elif text not in self._pins:
            # The disk notes a use once a minute only.
            self._append(text, entry.size, max(entry.last_used, known[1]))

    def order(self) -> Iterator[None]:
        """Put what was found in order, least recently used first; some at a time."""
        for text in list(self._pins):
            known = self._known.get(text)
            if known is not None:
                self._append(text, *known)
        self._runs[-1].sort()
        for count, (last_used, text, size) in enumerate(heapq.merge(*self._runs)):
            self.total += size - self.kept.pop(text, (0, 0.0))[0]
            self.kept[text] = size, last_used
            if count % _SOME == 0:
                yield None
        for run in self._runs:
            run.clear()
            yield None

    def emptying(self) -> Iterator[None]:
        """Free what was known before; some at a time, as all at once would take 10 ms for 100,000."""
        while self.kept:
            for _ in range(min(_SOME, len(self.kept))):
                self.kept.popitem()
            yield None

    def _append(self, text: str, size: int, last_used: float) -> None:
        run = self._runs[-1]
        run.append((last_used, text, size))
        if len(run) == _RUN:
            run.sort()
            self._runs.append([])
