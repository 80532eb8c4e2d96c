from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.store.eviction import AT_ONCE, Known, excess_of, oldest, unused


def of(known: list[Known]) -> dict[str, Known]:
    return {f"content {number}": entry for number, entry in enumerate(known)}


KEPT = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 1000).map(float))).map(
    lambda known: of(sorted(known, key=lambda entry: entry[1]))
)
KEEP = st.sets(st.integers(0, 30).map(lambda number: f"content {number}"))


@given(KEPT, KEEP, st.integers(0, 1000))
def test_what_was_not_used_since(kept: dict[str, Known], keep: set[str], since: int) -> None:
    gone = list(unused(kept, keep, since))
    assert gone == [text for text, (_, last_used) in kept.items() if last_used < since and text not in keep]


@given(KEPT, KEEP, st.integers(0, 1000), st.integers(0, 1000))
def test_the_oldest_go_and_no_more_than_it_takes(kept: dict[str, Known], keep: set[str], least: int, more: int) -> None:
    gone = list(oldest(kept, keep, least, least + more))
    free = [text for text in kept if text not in keep]
    assert gone == free[: len(gone)]
    sizes = [kept[text][0] for text in gone]
    assert sum(sizes) >= least + more or gone == free
    assert sum(sizes[:-1]) < least + more or not gone


def test_no_more_go_at_once_than_it_takes_to_have_the_least() -> None:
    kept = of([(1, float(number)) for number in range(3 * AT_ONCE)])
    assert len(list(oldest(kept, (), 1, 2 * AT_ONCE))) == AT_ONCE
    assert len(list(oldest(kept, (), AT_ONCE + 1, 2 * AT_ONCE))) == AT_ONCE + 1
    assert len(list(unused(kept, (), 1e9))) == AT_ONCE


def test_frees_down_to_95_percent() -> None:
    assert (excess_of(100, 100), excess_of(101, 100), excess_of(110, 100)) == (0, 6, 15)
