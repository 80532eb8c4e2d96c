from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.oci.names import Digest
from dockerproxy.store.eviction import Entry, choose


def digest(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


ENTRIES = st.lists(
    st.builds(Entry, st.integers(0, 30).map(digest), st.integers(0, 100), st.integers(0, 1000).map(float)),
    unique_by=lambda entry: entry.digest,
)


@given(ENTRIES, st.integers(0, 2000), st.integers(0, 1000), st.sets(st.integers(0, 30).map(digest)))
def test_what_goes_and_what_stays(entries: list[Entry], limit: int, inactive: int, keep: set[Digest]) -> None:
    now = 1000.0
    chosen = choose(entries, limit=limit, inactive=inactive, now=now, keep=keep)
    gone, known = set(chosen), {entry.digest: entry for entry in entries}
    assert len(gone) == len(chosen)
    assert gone <= known.keys() - keep
    stays = [entry for entry in entries if entry.digest not in gone]
    free = [entry for entry in stays if entry.digest not in keep]
    assert all(now - entry.last_used <= inactive for entry in free)
    total = sum(entry.size for entry in stays)
    # Within the limit, or nothing is left that could go.
    assert total <= limit or not free
    evicted = [known[digest] for digest in chosen if now - known[digest].last_used <= inactive]
    if evicted:
        # The least recently used went, no more of them than it takes, and only because the limit was passed.
        assert all(entry.last_used <= other.last_used for entry in evicted for other in free)
        assert total + sum(entry.size for entry in evicted) > limit
        assert total + evicted[-1].size > int(limit * 0.95)


def test_frees_down_to_95_percent() -> None:
    entries = [Entry(digest(number), 10, float(number)) for number in range(11)]
    assert choose(entries, limit=110, inactive=1e9, now=20, keep=()) == []
    assert choose(entries, limit=100, inactive=1e9, now=20, keep=()) == [digest(0), digest(1)]
    assert choose(entries, limit=100, inactive=1e9, now=20, keep={digest(0)}) == [digest(1), digest(2)]


def test_the_order_is_the_same_in_every_process() -> None:
    entries = [Entry(digest(number), 10, 1.0) for number in range(10)]
    assert choose(entries, limit=50, inactive=1e9, now=2, keep=()) == choose(
        entries[::-1], limit=50, inactive=1e9, now=2, keep=()
    )
