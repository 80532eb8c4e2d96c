from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.store.eviction import (
    BATCH_SIZE,
    LRUEntry,
    Segment,
    excess_bytes,
    first_keys,
    inactive_since,
    order_of_excess,
    order_of_rest,
)


def index_entries(entries: list[LRUEntry]) -> dict[str, LRUEntry]:
    return {f"content {number}": entry for number, entry in enumerate(entries)}


OWNERS = st.sampled_from(["", "one", "two", "three"])
SIZES = st.integers(0, 100)
ENTRIES = st.lists(st.tuples(SIZES, st.integers(0, 1000).map(float), OWNERS, OWNERS)).map(
    lambda known: index_entries(sorted(known, key=lambda entry: entry[1]))
)
PINS = st.sets(st.integers(0, 30).map(lambda number: f"content {number}"))


def segment(entries: dict[str, LRUEntry]) -> Segment:
    result = Segment()
    for text, entry in entries.items():
        result.add(text, entry)
    return result


def blobs(*owners: tuple[str, str], size: int = 10, start: int = 0) -> Segment:
    """Return a segment of blobs named by numbers from `start` on, with these clients and registries, oldest first."""
    result = Segment()
    for number, (client, registry) in enumerate(owners, start):
        result.add(str(number), (size, float(number), client, registry))
    return result


@given(ENTRIES, PINS, st.integers(0, 1000))
def test_inactive_since(entries: dict[str, LRUEntry], pins: set[str], since: int) -> None:
    evicted = list(inactive_since(entries, pins, since))
    assert evicted == [text for text, entry in entries.items() if entry[1] < since and text not in pins]


@given(ENTRIES, st.data())
def test_segment_counts_what_each_owner_has(entries: dict[str, LRUEntry], data: st.DataObject) -> None:
    counted = segment(entries)
    removed = data.draw(st.sets(st.sampled_from(sorted(entries)))) if entries else set()
    for text in removed:
        assert counted.pop(text) == entries[text]
    assert counted.pop("unknown") is None
    kept = [entry for text, entry in entries.items() if text not in removed]
    assert counted.total == sum(size for size, _, _, _ in kept)
    for held, column in ((counted.by_client, 2), (counted.by_registry, 3)):
        expected: Counter[str] = Counter()
        for entry in kept:
            expected[str(entry[column])] += entry[0]
        assert held == +expected


@given(ENTRIES, PINS)
def test_every_unpinned_blob_leaves_once(entries: dict[str, LRUEntry], pins: set[str]) -> None:
    assert sorted(segment(entries).order(pins)) == sorted(set(entries) - pins)


@given(ENTRIES)
def test_blobs_of_one_owner_leave_by_their_last_use(entries: dict[str, LRUEntry]) -> None:
    order = list(segment(entries).order(()))
    for owner in {entry[2:] for entry in entries.values()}:
        mine = [text for text in order if entries[text][2:] == owner]
        assert mine == [text for text, entry in entries.items() if entry[2:] == owner]


@given(ENTRIES)
def test_no_blob_of_others_leaves_while_a_client_has_more_than_half(entries: dict[str, LRUEntry]) -> None:
    left = dict(entries)
    for text in segment(entries).order(()):
        held: Counter[str] = Counter()
        for size, _, client, _ in left.values():
            held[client] += size
        total = sum(held.values())
        greedy = [client for client, size in held.items() if client and size * 2 > total]
        # Once a client has half, others leave in turn, which may bring it above the half again.
        if greedy and left == entries:
            assert entries[text][2] == greedy[0]
        del left[text]


def test_least_recently_used_first_if_nobody_has_more_than_half() -> None:
    owners = [("one", "a"), ("two", "b"), ("three", "c"), ("", ""), ("two", "c"), ("", "")]
    assert list(blobs(*owners).order({"1"})) == ["0", "2", "3", "4", "5"]
    assert list(blobs(*[("one", "a")] * 4).order(())) == ["0", "1", "2", "3"]
    assert list(blobs(*[("", "")] * 4).order(())) == ["0", "1", "2", "3"]


def test_a_client_beyond_its_share_loses_its_own_blobs_first() -> None:
    owners = [("other", "a"), ("other", "b"), ("greedy", "a"), ("greedy", "b"), ("greedy", "c"), ("greedy", "d")]
    assert list(blobs(*owners).order(())) == ["2", "3", "0", "1", "4", "5"]


def test_a_registry_beyond_its_share_loses_its_own_blobs_first() -> None:
    owners = [("one", "a"), ("two", "b"), ("three", "evil"), ("four", "evil"), ("five", "evil"), ("six", "evil")]
    assert list(blobs(*owners).order(())) == ["2", "3", "0", "1", "4", "5"]


def test_a_client_and_its_registry_are_counted_together() -> None:
    owners = [("one", "a"), ("two", "b"), ("greedy", "evil"), ("greedy", "evil"), ("greedy", "evil"), ("three", "evil")]
    assert list(blobs(*owners).order(())) == ["2", "3", "0", "1", "4", "5"]
    owners = [("all", "a"), ("all", "a"), ("all", "evil"), ("all", "evil"), ("all", "evil"), ("all", "evil")]
    assert list(blobs(*owners).order(())) == ["2", "3", "0", "1", "4", "5"]
    owners = [
        ("one", "all"),
        ("two", "all"),
        ("greedy", "all"),
        ("greedy", "all"),
        ("greedy", "all"),
        ("greedy", "all"),
    ]
    assert list(blobs(*owners).order(())) == ["2", "3", "0", "1", "4", "5"]


def test_blobs_used_once_leave_until_they_have_an_eighth() -> None:
    once, again = blobs(*[("", "")] * 4), blobs(*[("", "")] * 3, start=10)
    assert list(order_of_excess(once, (), limit=160)) == ["0", "1"]
    assert list(order_of_excess(once, (), limit=1000)) == []
    assert list(order_of_excess(once, ("1", "2"), limit=8)) == ["0", "3"]
    assert list(order_of_rest(once, again, ("1", "11"))) == ["10", "12", "0", "2", "3"]


@given(st.lists(SIZES), st.integers(0, 1000), st.integers(0, 1000))
def test_no_more_than_needed(sizes: list[int], minimum: int, surplus: int) -> None:
    order = [(str(number), size) for number, size in enumerate(sizes)]
    chosen = list(first_keys(order, minimum, minimum + surplus))
    assert chosen == [text for text, _ in order[: len(chosen)]]
    assert sum(sizes[: len(chosen)]) >= minimum + surplus or len(chosen) == len(sizes)
    assert sum(sizes[: len(chosen) - 1]) < minimum + surplus or not chosen


def test_a_batch_grows_only_up_to_the_minimum() -> None:
    order = [(str(number), 1) for number in range(3 * BATCH_SIZE)]
    assert len(list(first_keys(order, 1, 2 * BATCH_SIZE))) == BATCH_SIZE
    assert len(list(first_keys(order, BATCH_SIZE + 1, 2 * BATCH_SIZE))) == BATCH_SIZE + 1
    entries = index_entries([(1, float(number), "", "") for number in range(3 * BATCH_SIZE)])
    assert len(list(inactive_since(entries, (), 1e9))) == BATCH_SIZE


def test_frees_down_to_the_low_watermark() -> None:
    assert (excess_bytes(100, 100), excess_bytes(101, 100), excess_bytes(110, 100)) == (0, 6, 15)
