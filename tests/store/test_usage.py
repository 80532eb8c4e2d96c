from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import Entry
from dockerproxy.store.usage import DoesNotFit, Usage


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


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
        self.usage.load(Entry(digest, size, float(last)) for digest, (size, last) in found.items())
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
    usage.load([])
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
