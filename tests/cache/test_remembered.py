"""What is remembered of manifests: for a short while, and no more than so much of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from dockerproxy.cache.remembered import RememberedManifests
from dockerproxy.oci.contents import ManifestAnswer
from dockerproxy.oci.names import Digest

MOST, EACH, LARGEST = 4 * 1024 * 1024, 1024, 256 * 1024


def answer(content: bytes, media_type: str = "a/b") -> ManifestAnswer:
    return ManifestAnswer(Digest.of(content), media_type, len(content), content, "HIT")


def test_it_is_by_repository_and_digest() -> None:
    remembered, one = RememberedManifests(Clock().seconds), answer(b"1")
    remembered.add("a", one)
    assert remembered.get("a", one.digest) is one
    assert remembered.get("b", one.digest) is None
    assert remembered.get("a", Digest.of(b"2")) is None


@pytest.mark.parametrize(("seconds", "known"), [(29.9, True), (30, False), (-1, False)])
def test_it_is_for_a_short_while_by_any_clock(seconds: float, known: bool) -> None:
    now = [1000.0]
    remembered, one = RememberedManifests(lambda: now[0]), answer(b"1")
    remembered.add("a", one)
    now[0] += seconds
    assert (remembered.get("a", one.digest) is one) is known
    now[0] = 1000
    assert (remembered.get("a", one.digest) is one) is known


def test_what_is_added_again_counts_from_then_on() -> None:
    clock = Clock()
    remembered = RememberedManifests(clock.seconds)
    remembered.add("a", answer(b"1"))
    clock.advance(29)
    remembered.add("a", answer(b"1", "c/d"))
    clock.advance(29)
    found = remembered.get("a", Digest.of(b"1"))
    assert found is not None
    assert found.media_type == "c/d"


def test_what_is_forgotten_is_gone() -> None:
    remembered, one = RememberedManifests(Clock().seconds), answer(b"1")
    remembered.add("a", one)
    remembered.forget("a", one.digest)
    remembered.forget("a", one.digest)
    assert remembered.get("a", one.digest) is None


@given(st.lists(st.sampled_from([0, 1000, LARGEST // 2, LARGEST - 10, LARGEST]), min_size=20, max_size=60))
def test_all_of_it_has_a_bound_and_the_latest_stay(sizes: list[int]) -> None:
    remembered = RememberedManifests(Clock().seconds)
    added = [answer(b"%d," % number + bytes(size)) for number, size in enumerate(sizes)]
    for one in added:
        remembered.add("a", one)
    room, expected = MOST, []
    for one in reversed([one for one in added if one.size <= LARGEST]):
        room -= one.size + EACH
        if room < 0:
            break
        expected.append(one.digest)
    assert [one.digest for one in reversed(added) if remembered.get("a", one.digest) is not None] == expected
