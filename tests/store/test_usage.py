from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dockerproxy.oci.names import Digest
from dockerproxy.store import usage as usage_module
from dockerproxy.store.eviction import Entry
from dockerproxy.store.usage import DoesNotFit, Usage


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


def load(usage: Usage, found: Iterable[Entry]) -> None:
    """Let `usage` count anew, with nothing going on meanwhile."""
    recount = usage.recount()
    for entry in found:
        recount.add(entry)
    deque(recount.order(), maxlen=0)
    usage.adopt(recount)


DIGESTS = st.integers(0, 8).map(digest)
SIZES = st.integers(0, 60)


class UsageMachine(RuleBasedStateMachine):
    """`Usage` beside a dict of sizes and last uses, and a dict of pins. Time goes by one at each use."""

    @initialize(limit=st.integers(0, 200))
    def start(self, limit: int) -> None:
        self.usage = Usage(limit)
        self.limit = limit
        self.now = 0.0
        self.model: dict[Digest, tuple[int, float]] = {}
        self.pins: dict[Digest, int] = {}

    def tick(self) -> float:
        self.now += 1
        return self.now

    @rule(digest=DIGESTS, size=SIZES)
    def add(self, digest: Digest, size: int) -> None:
        self.model[digest] = (size, self.tick())
        self.usage.add(digest, size, self.now)

    @rule(digest=DIGESTS)
    def touch(self, digest: Digest) -> None:
        self.usage.touch(digest, self.tick())
        if digest in self.model:
            self.model[digest] = (self.model[digest][0], self.now)

    @rule(digest=DIGESTS)
    def remove(self, digest: Digest) -> None:
        self.usage.remove(digest)
        self.model.pop(digest, None)

    @rule(digest=DIGESTS)
    def pin(self, digest: Digest) -> None:
        self.usage.pin(digest)
        self.pins[digest] = self.pins.get(digest, 0) + 1

    @rule(digest=DIGESTS)
    def unpin(self, digest: Digest) -> None:
        if not self.pins.get(digest):
            with pytest.raises(KeyError):
                self.usage.unpin(digest)
        else:
            self.usage.unpin(digest)
            self.pins[digest] -= 1

    @rule(found=st.dictionaries(DIGESTS, st.tuples(SIZES, st.integers(0, 20))))
    def load(self, found: dict[Digest, tuple[int, int]]) -> None:
        load(self.usage, [Entry(digest, size, float(last)) for digest, (size, last) in found.items()])
        model = {digest: known for digest, known in self.model.items() if self.pinned(digest)}
        for digest, (size, last) in found.items():
            if digest not in model:
                model[digest] = (size, max(last, self.model.get(digest, (0, 0.0))[1]))
        self.model = model
        self.now = max(self.now, 20.0)

    @rule(wanted=st.integers(0, 250))
    def make_room(self, wanted: int) -> None:
        total = sum(size for size, _ in self.model.values())
        kept = sum(size for digest, (size, _) in self.model.items() if self.pinned(digest))
        if kept + wanted > self.limit and total + wanted > self.limit:
            with pytest.raises(DoesNotFit):
                self.usage.make_room(wanted)
            return
        chosen = self.usage.make_room(wanted)
        if total + wanted <= self.limit:
            assert chosen == []
        self.gone(chosen)
        assert sum(size for size, _ in self.model.values()) + wanted <= self.limit

    @rule(inactive=st.integers(0, 40))
    def expire(self, inactive: int) -> None:
        self.gone(self.usage.expire(inactive, self.now))
        free = {digest: known for digest, known in self.model.items() if not self.pinned(digest)}
        assert all(self.now - last <= inactive for _, last in free.values())
        assert self.usage.total <= self.limit or not free

    def pinned(self, digest: Digest) -> bool:
        return self.pins.get(digest, 0) > 0

    def gone(self, chosen: list[Digest]) -> None:
        lasts = [self.model.pop(digest)[1] for digest in chosen]
        assert not any(map(self.pinned, chosen))
        assert lasts == sorted(lasts)
        assert all(last >= lasts[-1] for digest, (_, last) in self.model.items() if lasts and not self.pinned(digest))

    @invariant()
    def counts_what_is_there(self) -> None:
        if hasattr(self, "usage"):
            assert self.usage.total == sum(size for size, _ in self.model.values())


TestUsage = UsageMachine.TestCase


def test_two_who_need_room_get_different_bytes() -> None:
    usage = Usage(100)
    for number in range(10):
        usage.add(digest(number), 10, number)
    assert usage.make_room(5) == [digest(0)]
    usage.add(digest(10), 5, 11)
    assert usage.make_room(50) == [digest(number) for number in range(1, 6)]


def test_a_reservation_holds_until_it_is_given_back() -> None:
    usage = Usage(100)
    usage.add(digest(1), 60, 1)
    usage.pin(digest(1))
    with pytest.raises(DoesNotFit):
        usage.make_room(60)
    load(usage, [])
    assert usage.total == 60
    usage.unpin(digest(1))
    assert usage.make_room(60) == [digest(1)]


def test_room_is_made_where_95_percent_cannot_be_reached() -> None:
    usage = Usage(100)
    for number in range(10):
        usage.add(digest(number), 10, number)
    usage.pin(digest(9))
    assert usage.make_room(88) == [digest(number) for number in range(9)]
    usage = Usage(100)
    usage.add(digest(1), 2, 1)
    usage.add(digest(2), 2, 2)
    assert usage.make_room(98) == [digest(1)]


def test_what_changes_during_a_recount() -> None:
    """Nothing of it is counted as it was seen, be it before the change or after."""
    usage = Usage(1000)
    for number in range(6):
        usage.add(digest(number), 10, number)
    recount = usage.recount()
    for number in range(6):
        recount.add(Entry(digest(number), 10, number))
    usage.remove(digest(0))
    usage.add(digest(1), 20, 10)
    usage.touch(digest(2), 11)
    usage.add(digest(6), 70, 12)
    usage.pin(digest(7))
    usage.add(digest(7), 5, 13)
    deque(recount.order(), maxlen=0)
    usage.adopt(recount)
    usage.unpin(digest(7))
    assert usage.total == 20 + 4 * 10 + 70 + 5
    usage.limit = 0
    assert usage.make_room(0) == list(map(digest, (3, 4, 5, 1, 2, 6, 7)))
    # And from now on changes are no longer noted.
    usage.touch(digest(1), 20)
    assert usage._changed is None


def test_a_recount_is_sorted_a_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "_RUN", 3)
    usage = Usage(1000)
    load(usage, [Entry(digest(number), 1, number * 7 % 20) for number in range(20)])
    usage.limit = 0
    assert usage.make_room(0) == [digest(number) for number in sorted(range(20), key=lambda number: number * 7 % 20)]


def test_so_many_go_at_once_where_that_will_do() -> None:
    usage = Usage(20_000)
    for number in range(20_000):
        usage.add(digest(number), 1, number)
    usage.add(digest(20_000), 1, 20_000)
    assert len(usage.make_room(0)) == 500
    assert usage.make_room(0) == []
    assert len(usage.make_room(2000)) == 1501
    assert [len(usage.expire(0, 30_000)) for _ in range(3)] == [500] * 3


def test_a_large_cache_is_nothing_that_the_cyclic_collector_looks_through() -> None:
    """It holds the whole process while it looks at each object that it tracks; text, numbers and their tuples are not
    among them after a first look."""
    tracked = {}
    for count in (10, 3000):
        usage = Usage(1 << 40)
        gc.collect()
        before = len(gc.get_objects())
        load(usage, (Entry(digest(number), 1, float(number)) for number in range(count)))
        gc.collect()
        tracked[count] = len(gc.get_objects()) - before
        assert usage.total == count
    assert abs(tracked[3000] - tracked[10]) < 20
