"""The order of members, and those that are down."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.fleet.members import RETRY_DELAYS, Members, blob_key, ordered, repository_key

names = st.sets(st.integers(1, 250).map(lambda number: f"10.0.0.{number}:3128"), min_size=2, max_size=12)
keys = st.text("0123456789abcdef", min_size=8, max_size=16)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_members(*known: str, me: str = "a:1") -> tuple[Members, FakeClock]:
    clock = FakeClock()
    members = Members(clock)
    members.use(known, me)
    return members, clock


@given(names, keys)
def test_the_order_has_every_member_once_and_depends_on_the_list_only(known: set[str], key: str) -> None:
    order = ordered(key, tuple(sorted(known)))
    assert sorted(order) == sorted(known)
    assert order == ordered(key, tuple(sorted(known)))


@given(names, keys, st.data())
def test_without_a_member_the_others_keep_their_order(known: set[str], key: str, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(sorted(known)))
    before = ordered(key, tuple(sorted(known)))
    assert ordered(key, tuple(sorted(known - {gone}))) == tuple(name for name in before if name != gone)


@given(names, keys)
def test_the_former_owner_is_second_after_a_new_one(known: set[str], key: str) -> None:
    new = "10.0.1.1:3128"
    former = ordered(key, tuple(sorted(known)))[0]
    order = ordered(key, tuple(sorted(known | {new})))
    assert order[0] == former or (order[0] == new and order[1] == former)


def test_members_own_about_the_same_number_of_blobs() -> None:
    known = tuple(f"10.0.0.{number}:3128" for number in range(10))
    owners = Counter(ordered(blob_key(f"sha256:{number:064x}"), known)[0] for number in range(5000))
    assert max(owners.values()) < 1.3 * 500 and min(owners.values()) > 0.7 * 500


def test_tags_of_a_repository_have_one_owner() -> None:
    assert repository_key("quay.io", "a/b") == "quay.io/a/b"


def test_a_failed_member_is_left_alone_for_longer_and_longer() -> None:
    members, clock = make_members("a:1", "b:1")
    for delay in (*RETRY_DELAYS, RETRY_DELAYS[-1]):
        members.failed("b:1", "refused")
        clock.now += delay - 0.01
        assert members.is_down("b:1")
        assert members.ranked("key") == ["a:1"]
        clock.now += 0.01
        assert not members.is_down("b:1")


def test_failures_of_requests_at_once_count_once() -> None:
    members, clock = make_members("a:1", "b:1")
    assert [members.failed("b:1", "reset") for _ in range(100)] == [True] + [False] * 99
    clock.now += RETRY_DELAYS[0]
    assert not members.is_down("b:1")


def test_a_response_that_began_before_the_failure_changes_nothing() -> None:
    members, clock = make_members("a:1", "b:1")
    members.failed("b:1", "reset")
    assert not members.worked("b:1") and members.is_down("b:1")
    clock.now += RETRY_DELAYS[0]
    assert members.worked("b:1")
    assert members.failed("b:1", "reset")  # it begins again with the shortest delay
    clock.now += RETRY_DELAYS[0]
    assert not members.is_down("b:1")


def test_this_daemon_is_never_down_and_strangers_are_not_counted() -> None:
    members, _ = make_members("a:1", "b:1")
    members.failed("a:1", "reset")
    members.failed("stranger:1", "reset")
    members.distrusted("a:1", "wrong", 600)
    assert members.states() == {"a:1": "me", "b:1": "up"}


def test_a_member_that_sent_wrong_content_is_left_alone_for_long() -> None:
    members, clock = make_members("a:1", "b:1")
    members.distrusted("b:1", "wrong content", 600)
    clock.now += 599
    assert members.is_down("b:1") and members.states()["b:1"] == "wrong content"
    assert members.count_others() == (0, 1)


def test_a_new_list_keeps_what_is_known_of_those_that_stay() -> None:
    members, _ = make_members("a:1", "b:1", "c:1")
    members.failed("b:1", "reset")
    members.failed("c:1", "reset")
    members.use(("a:1", "b:1", "d:1"), "a:1")
    assert members.states() == {"a:1": "me", "b:1": "reset", "d:1": "up"} and members.count_others() == (1, 1)


def test_a_member_that_comes_back_is_left_alone_for_the_rest_of_its_time() -> None:
    members, clock = make_members("a:1", "b:1")
    members.distrusted("b:1", "wrong content", 600)
    members.use(("a:1",), "a:1")
    members.use(("a:1", "b:1"), "a:1")
    assert members.is_down("b:1")
    members.use(("a:1",), "a:1")
    clock.now += 601
    members.use(("a:1",), "a:1")
    members.use(("a:1", "b:1"), "a:1")
    assert members.states()["b:1"] == "up"


def test_who_makes_room_learns_of_some_copies_in_each_second() -> None:
    """A thousand members times a thousand keys would take a second."""
    known = [f"10.{number // 250}.{number % 250}.1:3128" for number in range(1000)]
    members, clock = make_members(*known, me=known[0])
    keys = [f"sha256:{number:064x}" for number in range(200)]
    assert sum(map(members.is_copy, keys)) == 50
    assert sum(map(members.is_copy, keys)) == 50  # the same, which are known
    clock.now += 1
    assert sum(map(members.is_copy, keys)) == 100
    members.use(known, known[0])  # a new list
    assert sum(map(members.is_copy, keys)) == 0
    clock.now += 1
    assert all(members.is_copy(key) != members.owns(key) for key in keys[:50])


def test_nobody_is_asked_without_members() -> None:
    members, _ = make_members(me="")
    assert members.ranked("key") == [] and not members.owns("key")


def test_the_owner_is_that_of_the_list_also_while_it_is_down() -> None:
    members, _ = make_members("a:1", "b:1")
    key = next(f"key{number}" for number in range(100) if ordered(f"key{number}", ("a:1", "b:1"))[0] == "b:1")
    members.failed("b:1", "reset")
    assert members.ranked(key) == ["a:1"] and not members.owns(key)
