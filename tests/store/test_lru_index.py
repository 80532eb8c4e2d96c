from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dockerproxy.oci.names import Digest
from dockerproxy.store import lru_index
from dockerproxy.store.eviction import Entry
from dockerproxy.store.layout import IngestKey
from dockerproxy.store.lru_index import CacheFull, LRUIndex


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


def rescan(index: LRUIndex, entries: Iterable[Entry]) -> None:
    """Run a whole rescan of `index` that finds `entries`, without concurrent changes."""
    scan = index.start_rescan()
    for entry in entries:
        scan.add(entry)
    deque(scan.sort(), maxlen=0)
    index.apply_rescan(scan)


DIGESTS = st.integers(0, 8).map(digest)
SIZES = st.integers(0, 60)


class LRUIndexMachine(RuleBasedStateMachine):
    """Compare `LRUIndex` with a dict of sizes and last uses, the sets of those used again and kept, and a dict of pins.

    Each use advances the time by one.
    """

    @initialize(limit=st.integers(0, 200))
    def start(self, limit: int) -> None:
        self.index = LRUIndex(limit)
        self.limit = limit
        self.now = 0.0
        self.model: dict[Digest, tuple[int, float]] = {}
        self.again: set[Digest] = set()
        self.pins: dict[Digest, int] = {}
        self.kept: set[Digest] = set()

    @rule(digests=st.sets(DIGESTS))
    def keep(self, digests: set[Digest]) -> None:
        now = self.tick()
        self.index.keep(digests - self.kept, now)
        self.index.stop_keeping(self.kept - digests, now)
        for digest in digests ^ self.kept:
            if digest in self.model:
                self.model[digest] = (self.model[digest][0], now)
        self.again |= {digest for digest in self.kept - digests if digest in self.model}
        self.again -= digests
        self.kept = digests

    def tick(self) -> float:
        self.now += 1
        return self.now

    @rule(digest=DIGESTS, size=SIZES)
    def add(self, digest: Digest, size: int) -> None:
        is_second_use = self.use_again(digest)
        self.model[digest] = (size, self.tick())
        assert self.index.add(digest, size, self.now) is is_second_use

    def use_again(self, digest: Digest) -> bool:
        """Record a use of `digest` in `again`, and return whether it is the second one."""
        is_second_use = digest in self.model and digest not in self.again | self.kept
        if is_second_use:
            self.again.add(digest)
        return is_second_use

    @rule(digest=DIGESTS)
    def touch(self, digest: Digest) -> None:
        assert self.index.touch(digest, self.tick()) is self.use_again(digest)
        if digest in self.model:
            self.model[digest] = (self.model[digest][0], self.now)

    @rule(digest=DIGESTS)
    def remove(self, digest: Digest) -> None:
        self.index.remove(digest)
        self.model.pop(digest, None)
        self.again.discard(digest)

    @rule(digest=DIGESTS)
    def pin(self, digest: Digest) -> None:
        self.index.pin(digest)
        self.pins[digest] = self.pins.get(digest, 0) + 1

    @rule(digest=DIGESTS)
    def unpin(self, digest: Digest) -> None:
        if not self.pins.get(digest):
            with pytest.raises(KeyError):
                self.index.unpin(digest)
        else:
            self.index.unpin(digest)
            self.pins[digest] -= 1

    @rule(found=st.dictionaries(DIGESTS, st.tuples(SIZES, st.integers(0, 20))), again=st.sets(DIGESTS))
    def rescan(self, found: dict[Digest, tuple[int, int]], again: set[Digest]) -> None:
        rescan(
            self.index,
            [Entry(digest, size, float(last), digest in again) for digest, (size, last) in found.items()],
        )
        again = {digest for digest in found if digest in again or digest in self.again}
        self.again = {digest for digest in self.again if self.is_pinned(digest)} | {
            digest for digest in again if not (digest in self.model and self.is_pinned(digest))
        }
        self.again -= self.kept
        model = {digest: entry for digest, entry in self.model.items() if self.is_pinned(digest)}
        for digest, (size, last) in found.items():
            if digest not in model:
                model[digest] = (size, max(last, self.model.get(digest, (0, 0.0))[1]))
        self.model = model
        self.now = max(self.now, 20.0)

    @rule(wanted=st.integers(0, 250))
    def evict(self, wanted: int) -> None:
        total = sum(size for size, _ in self.model.values())
        pinned_bytes = sum(size for digest, (size, _) in self.model.items() if self.stays(digest))
        assert self.index.evictable == total - pinned_bytes
        if pinned_bytes + wanted > self.limit and total + wanted > self.limit:
            with pytest.raises(CacheFull):
                self.index.evict(wanted)
            return
        evicted = self.index.evict(wanted)
        if total + wanted <= self.limit:
            assert evicted == []
        self.check_evicted(evicted)
        assert sum(size for size, _ in self.model.values()) + wanted <= self.limit

    @rule(inactive=st.integers(0, 40))
    def expire(self, inactive: int) -> None:
        self.check_evicted(self.index.expire(inactive, self.now))
        evictable = {digest: entry for digest, entry in self.model.items() if not self.stays(digest)}
        assert all(self.now - last <= inactive for _, last in evictable.values())
        assert self.index.total <= self.limit or not evictable

    def is_pinned(self, digest: Digest) -> bool:
        return self.pins.get(digest, 0) > 0

    def stays(self, digest: Digest) -> bool:
        return digest in self.kept or self.is_pinned(digest)

    def check_evicted(self, evicted: list[Digest]) -> None:
        assert not any(map(self.stays, evicted))
        for again in (False, True):
            lasts = [self.model[digest][1] for digest in evicted if (digest in self.again) is again]
            assert lasts == sorted(lasts)
            left = [
                last
                for digest, (_, last) in self.model.items()
                if (digest in self.again) is again and digest not in evicted and not self.stays(digest)
            ]
            assert not lasts or not left or min(left) >= lasts[-1]
        for digest in evicted:
            del self.model[digest]
        self.again -= set(evicted)

    @invariant()
    def check_total(self) -> None:
        if hasattr(self, "index"):
            assert self.index.total == sum(size for size, _ in self.model.values())
            assert self.index.kept_bytes == sum(self.model[one][0] for one in self.kept if one in self.model)


TestLRUIndex = LRUIndexMachine.TestCase


def test_two_evictions_do_not_return_the_same_blob() -> None:
    index = LRUIndex(100)
    for number in range(10):
        index.add(digest(number), 10, number)
    assert index.evict(5) == [digest(0)]
    index.add(digest(10), 5, 11)
    assert index.evict(50) == [digest(number) for number in range(1, 6)]


def test_a_pinned_blob_is_not_evicted() -> None:
    index = LRUIndex(100)
    index.add(digest(1), 60, 1)
    index.pin(digest(1))
    with pytest.raises(CacheFull):
        index.evict(60)
    rescan(index, [])
    assert index.total == 60
    index.unpin(digest(1))
    assert index.evict(60) == [digest(1)]


def test_kept_blobs_stay_when_all_else_goes() -> None:
    index = LRUIndex(100, entry_cost=1)
    index.keep([digest(1), digest(2)], 0)  # before they are here
    for number in range(4):
        index.add(digest(number), 20, number, "client", "registry")
    assert (index.kept_bytes, index.evictable) == (42, 42)
    assert index.held_bytes()[0] == {"client": 40}
    assert set(index.evict(58)) == {digest(0), digest(3)}
    assert index.expire(0, 1e9) == [] and index.evict_count(10) == []
    with pytest.raises(CacheFull, match="42 bytes in use"):
        index.evict(59)
    index.stop_keeping([digest(1)], 10)
    assert index.evict(59) == [digest(1)]


def test_blobs_that_are_kept_while_a_rescan_runs() -> None:
    index = LRUIndex(100)
    index.keep([digest(0), digest(1)], 0)
    scan = index.start_rescan()  # the first one: the index is empty
    for number in range(3):
        scan.add(Entry(digest(number), 10, number))
    deque(scan.sort(), maxlen=0)
    index.keep([digest(2)], 5)
    index.stop_keeping([digest(0)], 5)
    index.apply_rescan(scan)
    assert index.kept_bytes == 20
    assert index.expire(0, 1e9) == [digest(0)]


def test_evicts_the_minimum_if_the_low_watermark_is_unreachable() -> None:
    index = LRUIndex(100)
    for number in range(10):
        index.add(digest(number), 10, number)
    index.pin(digest(9))
    assert index.evict(88) == [digest(number) for number in range(9)]
    index = LRUIndex(100)
    index.add(digest(1), 2, 1)
    index.add(digest(2), 2, 2)
    assert index.evict(98) == [digest(1)]


def test_changes_during_a_rescan_are_retained() -> None:
    """The index keeps the changed entries, whether the rescan saw the blobs before the change or after it."""
    index = LRUIndex(1000)
    for number in range(6):
        index.add(digest(number), 10, number)
    scan = index.start_rescan()
    for number in range(6):
        scan.add(Entry(digest(number), 10, number))
    index.remove(digest(0))
    index.add(digest(1), 20, 10)
    index.touch(digest(2), 11)
    index.add(digest(6), 70, 12)
    index.pin(digest(7))
    index.add(digest(7), 5, 13)
    deque(scan.sort(), maxlen=0)
    index.apply_rescan(scan)
    index.unpin(digest(7))
    assert index.total == 20 + 4 * 10 + 70 + 5
    index.limit = 0
    assert index.evict(0) == list(map(digest, (3, 4, 5, 6, 7, 1, 2)))  # 1 and 2 were used again
    # After the rescan, changes are no longer recorded.
    index.touch(digest(1), 20)
    assert index._dirty is None


def test_a_rescan_is_sorted_incrementally(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_index, "_RUN_LENGTH", 3)
    index = LRUIndex(1000)
    rescan(index, [Entry(digest(number), 1, number * 7 % 20) for number in range(20)])
    index.limit = 0
    assert index.evict(0) == [digest(number) for number in sorted(range(20), key=lambda number: number * 7 % 20)]


def test_eviction_works_in_batches() -> None:
    index = LRUIndex(20_000)
    for number in range(20_000):
        index.add(digest(number), 1, number)
    index.add(digest(20_000), 1, 20_000)
    assert len(index.evict(0)) == 500
    assert index.evict(0) == []
    assert len(index.evict(2000)) == 1501
    assert [len(index.expire(0, 30_000)) for _ in range(3)] == [500] * 3


def test_small_blobs_count_what_their_files_take() -> None:
    """Blobs of one byte take two inodes and two blocks each; without a cost, any number of them would fit."""
    index = LRUIndex(1000, entry_cost=100)
    for number in range(9):
        index.add(digest(number), 1, number)
        assert index.evict(0) == []
    assert (index.used, index.free, index.evictable) == (909, 91, 909)
    assert index.evict(92) == [digest(0)]
    index.pin(digest(1))
    assert index.evictable == 7 * 101
    with pytest.raises(CacheFull, match="1000 bytes with 101 bytes in use"):
        index.evict(900)
    index.add(digest(20), 500, 20)
    assert index.expire(1e9, 20) == [digest(number) for number in range(2, 7)]


def test_other_files_count_towards_the_limit() -> None:
    index = LRUIndex(1000)
    for number in range(5):
        index.add(digest(number), 100, number)
    index.overhead = 300
    assert index.free == 200
    assert index.evict(200) == []
    assert index.evict(201) == [digest(0)]
    with pytest.raises(CacheFull, match="1000 bytes with 300 bytes in use"):
        index.evict(701)
    index.overhead = 900
    assert index.expire(1e9, 10) == [digest(1), digest(2), digest(3)]


def test_eviction_by_number() -> None:
    index = LRUIndex(10_000)
    for number in range(600):
        index.add(digest(number), 1, number)
    index.pin(digest(0))
    assert index.evict_count(2) == [digest(1), digest(2)]
    assert len(index.evict_count(10_000)) == 500
    assert len(index.evict_count(10_000)) == 97
    assert index.evict_count(10_000) == []
    assert index.total == 1


def test_gc_tracked_objects_do_not_grow_with_the_index() -> None:
    """Python's garbage collector blocks the whole process while it looks at tracked objects.

    It does not track strings and numbers, and untracks tuples of them when it first sees them.
    """
    tracked = {}
    gc.freeze()  # or each collection would look at the objects of the tests before
    for count in (10, 3000):
        index = LRUIndex(1 << 40)
        gc.collect()
        before = len(gc.get_objects())
        rescan(index, (Entry(digest(number), 1, float(number)) for number in range(count)))
        gc.collect()
        tracked[count] = len(gc.get_objects()) - before
        assert index.total == count
    assert abs(tracked[3000] - tracked[10]) < 20


def test_new_blobs_replace_themselves_and_not_those_used_again() -> None:
    index = LRUIndex(100)
    for number in range(8):
        index.add(digest(number), 10, number, "fleet", "good.test")
    assert [index.touch(digest(number), 10 + number) for number in range(8)] == [True] * 8
    assert index.touch(digest(0), 20) is False
    for number in range(100, 200):
        index.evict(10)
        assert index.add(digest(number), 10, number, "scan", "evil.test") is False
    assert all(digest(number) in index for number in range(8))
    assert index.held_bytes() == ({"fleet": 80, "scan": 20}, {"good.test": 80, "evil.test": 20})


def test_blobs_used_once_only_are_a_plain_lru() -> None:
    index = LRUIndex(100)
    for number in range(50):
        index.evict(10)
        index.add(digest(number), 10, number, "fleet", "good.test")
    assert [digest(number) in index for number in range(50)] == [False] * 40 + [True] * 10


def test_new_blobs_used_again_replace_those_used_longest_ago() -> None:
    index = LRUIndex(100)
    for number in range(50):
        index.evict(10)
        index.add(digest(number), 10, number, "fleet", "good.test")
        index.touch(digest(number), number)
    assert [digest(number) in index for number in range(50)] == [False] * 40 + [True] * 10


@pytest.mark.parametrize("owner", ["client", "registry"])
def test_who_requests_each_blob_twice_has_half(owner: str) -> None:
    def owners(name: str, number: int) -> dict[str, str]:
        return {key: name if key == owner else f"{name} {number}" for key in ("client", "registry")}

    index = LRUIndex(100)
    for number in range(8):
        index.add(digest(number), 10, number, **owners("fleet", number % 4))
        index.touch(digest(number), 10 + number)
    for number in range(100, 200):
        index.evict(10)
        index.add(digest(number), 10, number, **owners("scan", number))
        index.touch(digest(number), number)
    assert sum(digest(number) in index for number in range(8)) >= 4


def test_a_blob_keeps_who_brought_it() -> None:
    index = LRUIndex(1000)
    index.add(digest(1), 10, 1, "first", "a.test")
    index.add(digest(1), 10, 2, "second", "b.test")
    rescan(index, [Entry(digest(1), 10, 3.0), Entry(digest(2), 5, 4.0, used_again=True)])
    assert index.held_bytes() == ({"first": 10, "": 5}, {"a.test": 10, "": 5})
    assert index.touch(digest(2), 5) is False


def test_a_partial_download_is_never_used_again() -> None:
    index = LRUIndex(100)
    key = IngestKey("evil.test", digest(1))
    for size in (10, 20, 30):
        assert index.add(key, size, size) is False
    index.add(digest(2), 10, 1)
    index.touch(digest(2), 40)
    index.limit = 35
    assert index.evict(0) == [key]


def test_copies_of_other_members_leave_first() -> None:
    """Also before blobs that were used once and less recently."""
    index = LRUIndex(100)
    for number in range(10):
        index.add(digest(number), 10, number)
    copies = {str(digest(number)) for number in (4, 7, 9)}
    index.evict_first(lambda text, entry: text in copies and entry[1] < 9)
    assert set(index.evict(15)) == {digest(4), digest(7)}
    assert index.evict(30)[0] == digest(0)  # the others as without a fleet


def test_pinned_copies_and_partial_downloads_stay() -> None:
    index = LRUIndex(100)
    index.add(digest(1), 50, 1)
    index.add(digest(2), 50, 2)
    index.pin(digest(2))
    index.evict_first(lambda text, entry: True)
    assert index.evict(10) == [digest(1)]
