"""The set of condemned entries."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.bucket.gc_runs import CondemnedSet

ENTRIES = st.lists(st.text(st.characters(blacklist_characters="\n", blacklist_categories=["Cs"]), min_size=1))


@given(ENTRIES, ENTRIES)
def test_membership(entries: list[str], others: list[str]) -> None:
    condemned = CondemnedSet.parse("\n".join(entries).encode())
    assert all(entry in condemned for entry in entries)
    assert not any(entry in condemned for entry in set(others) - set(entries))
    assert "sha256:0" not in CondemnedSet.parse(b"")
