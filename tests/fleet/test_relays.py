"""The trees in which members send a blob on."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.fleet.relays import TREE_TTL, Relays, RelayTree

steps = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=120)


def test_the_first_get_it_from_the_owner_and_the_others_from_those() -> None:
    tree = RelayTree(2)
    assert [tree.place(name, has_failed=False) for name in "abcdefg"] == [None, None, "a", "a", "b", "b", "c"]


def test_a_member_that_asks_again_keeps_its_place() -> None:
    tree = RelayTree(1)
    places = [tree.place(name, has_failed=False) for name in "abc"]
    assert [tree.place(name, has_failed=False) for name in "abc"] == places == [None, "a", "b"]


def test_the_successor_always_gets_it_from_the_owner() -> None:
    tree = RelayTree(2)
    assert [tree.place(name, has_failed=False, successor="z") for name in "abc"] == [None, "a", "a"]
    assert tree.place("z", has_failed=False, successor="z") is None
    assert tree.place("d", has_failed=False, successor="z") == "b"


def test_a_relay_that_failed_gets_no_more_members() -> None:
    tree = RelayTree(1)
    for name in "abcd":
        tree.place(name, has_failed=False)
    assert tree.place("c", has_failed=True) not in ("b", "d")  # d gets it from c
    assert tree.place("e", has_failed=False) not in ("b", "c")


@given(steps, st.integers(1, 4))
def test_nobody_has_too_many_and_there_are_no_circles(moves: list[tuple[int, bool]], fan_out: int) -> None:
    tree = RelayTree(fan_out)
    for number, has_failed in moves:
        parent = tree.place(f"m{number}", has_failed=has_failed)
        assert parent != f"m{number}"
        seen, name = set(), f"m{number}"
        while (name := tree._parents.get(name)) is not None:  # type: ignore[assignment]
            assert name not in seen
            seen.add(name)
    children = Counter(parent for parent in tree._parents.values() if parent is not None)
    assert all(count <= fan_out for count in children.values())


@given(st.integers(1, 300), st.integers(2, 8))
def test_without_failures_the_owner_has_no_more_than_the_others(size: int, fan_out: int) -> None:
    tree = RelayTree(fan_out)
    parents = {f"m{number}": tree.place(f"m{number}", has_failed=False) for number in range(size)}
    assert max(Counter(parents.values()).values()) <= fan_out
    depth, name = 0, f"m{size - 1}"
    while parents[name] is not None:
        depth, name = depth + 1, str(parents[name])
    assert fan_out**depth <= max(size, 1)


def test_trees_are_bounded_and_forgotten() -> None:
    now = [0.0]
    relays = Relays(1, lambda: now[0])
    assert [relays.place("key", name, has_failed=False) for name in "ab"] == [None, "a"]
    now[0] += TREE_TTL - 1
    assert relays.place("key", "c", has_failed=False) == "b"
    now[0] += TREE_TTL
    assert relays.place("key", "d", has_failed=False) is None
    for number in range(3000):
        relays.place(f"key{number}", "a", has_failed=False)
    assert len(relays._trees) == 1000
