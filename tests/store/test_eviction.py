from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.store.eviction import BATCH_SIZE, LRUEntry, excess_bytes, inactive_since, least_recently_used


def index_entries(entries: list[LRUEntry]) -> dict[str, LRUEntry]:
    return {f"content {number}": entry for number, entry in enumerate(entries)}


ENTRIES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1000).map(float))).map(
    lambda known: index_entries(sorted(known, key=lambda entry: entry[1]))
)
PINS = st.sets(st.integers(0, 30).map(lambda number: f"content {number}"))


@given(ENTRIES, PINS, st.integers(0, 1000))
def test_inactive_since(entries: dict[str, LRUEntry], pins: set[str], since: int) -> None:
    evicted = list(inactive_since(entries, pins, since))
    assert evicted == [text for text, (_, last_used) in entries.items() if last_used < since and text not in pins]


@given(ENTRIES, PINS, st.integers(0, 1000), st.integers(0, 1000))
def test_least_recently_used_first_and_no_more_than_needed(
    entries: dict[str, LRUEntry], pins: set[str], minimum: int, surplus: int
) -> None:
    evicted = list(least_recently_used(entries, pins, minimum, minimum + surplus))
    evictable = [text for text in entries if text not in pins]
    assert evicted == evictable[: len(evicted)]
    sizes = [entries[text][0] for text in evicted]
    assert sum(sizes) >= minimum + surplus or evicted == evictable
    assert sum(sizes[:-1]) < minimum + surplus or not evicted


def test_a_batch_grows_only_up_to_the_minimum() -> None:
    entries = index_entries([(1, float(number)) for number in range(3 * BATCH_SIZE)])
    assert len(list(least_recently_used(entries, (), 1, 2 * BATCH_SIZE))) == BATCH_SIZE
    assert len(list(least_recently_used(entries, (), BATCH_SIZE + 1, 2 * BATCH_SIZE))) == BATCH_SIZE + 1
    assert len(list(inactive_since(entries, (), 1e9))) == BATCH_SIZE


def test_frees_down_to_the_low_watermark() -> None:
    assert (excess_bytes(100, 100), excess_bytes(101, 100), excess_bytes(110, 100)) == (0, 6, 15)
