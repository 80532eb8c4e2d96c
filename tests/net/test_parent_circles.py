"""Parents that lead back to a proxy are noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import LoopDetected
from dockerproxy.net.parent_circles import ParentCircles
from dockerproxy.oci.names import Host

QUAY, HUB = Host("quay.io", 443), Host("registry-1.docker.io", 443)


def proxies(count: int) -> tuple[list[ParentCircles], list[float]]:
    now = [0.0]
    return [ParentCircles.of(bytes([number]) * 32, lambda: now[0]) for number in range(count)], now


@given(st.integers(1, 8))
def test_a_circle_of_any_length_is_noticed_by_the_first(size: int) -> None:
    members, _ = proxies(size)
    value = members[0].value(QUAY)
    for member in members[1:]:
        member.receive(QUAY, value)
        value = member.value(QUAY)
    with pytest.raises(LoopDetected) as raised:
        members[0].receive(QUAY, value)
    assert raised.value.status == 508 and "quay.io" in raised.value.message


def test_each_host_has_parents_of_its_own() -> None:
    (first, second), _ = proxies(2)
    second.receive(QUAY, first.value(QUAY))
    first.receive(HUB, second.value(HUB))  # NO_PROXY may send the two in different directions


def test_what_came_a_minute_ago_is_forgotten() -> None:
    (first, second), now = proxies(2)
    second.receive(QUAY, first.value(QUAY))
    now[0] = 60.0
    first.receive(QUAY, second.value(QUAY))


def test_elements_of_others_are_ignored() -> None:
    (first, second), _ = proxies(2)
    second.receive(QUAY, f"cdn.example, docker-registry-proxy, docker-registry-proxy;by=xyz, {first.value(QUAY)};q=1")
    assert second.value(QUAY).count("by=") == 1


def test_too_many_proxies_are_a_circle_too() -> None:
    (proxy,), _ = proxies(1)
    value = ", ".join(f"docker-registry-proxy;by={number:016x}" for number in range(16))
    with pytest.raises(LoopDetected):
        proxy.receive(QUAY, value)


def invented(count: int, start: int = 0) -> str:
    """Return the longest field of a stranger with names that it has made up, which come first and last in any order."""
    numbers = range(start, start + count)
    return ", ".join(
        f"docker-registry-proxy;by={number if number % 2 else 2**64 - 1 - number:016x}" for number in numbers
    )


def test_names_that_a_client_invents_do_not_make_parents_refuse() -> None:
    (child, parent), _ = proxies(2)
    for start in range(0, 150, 15):
        child.receive(QUAY, invented(15, start))
    parent.receive(QUAY, child.value(QUAY))


@pytest.mark.parametrize("size", [2, 3, 14])
def test_names_that_a_client_invents_hide_no_circle(size: int) -> None:
    members, _ = proxies(size)
    for member in members:
        member.receive(QUAY, invented(15))
    value = members[0].value(QUAY)
    with pytest.raises(LoopDetected, match="lead back"):  # in the first turn, because a circle has no other end
        for member in (*members[1:], members[0]):
            member.receive(QUAY, value)
            value = member.value(QUAY)


@given(st.lists(st.text(max_size=60), max_size=10))
def test_any_text_leaves_a_bounded_field(values: list[str]) -> None:
    (proxy,), _ = proxies(1)
    for number, value in enumerate(values):
        proxy.receive(QUAY, value)
        proxy.receive(QUAY, f"docker-registry-proxy;by={number:016x}")
    for number in range(40):
        proxy.receive(QUAY, f"docker-registry-proxy;by={number:016x}")
    assert proxy.value(QUAY).count("by=") <= 16


def test_the_name_is_that_of_all_processes_and_tells_nothing_of_the_secret() -> None:
    first, second = (ParentCircles.of(b"s" * 32, lambda: 0.0) for _ in range(2))
    assert first.name == second.name and len(first.name) == 16
