"""Bounds with a share for one client: no sequence of uses exceeds either, and none is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import RegistryError, ServiceOverloaded, TooManyRequests
from dockerproxy.shares import ClientShares, client_key


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["", "a", "b", "c"]), st.integers(1, 3))))
def test_neither_the_bound_nor_a_share_is_exceeded(uses: list[tuple[bool, str, int]]) -> None:
    shares = ClientShares("things", 6, 3, reserved=1)
    held = dict.fromkeys(["", "a", "b", "c"], 0)
    for is_release, client, amount in uses:
        if is_release:
            amount = min(amount, held[client])
            shares.release(client, amount)
            held[client] -= amount
            continue
        in_all = sum(held.values()) + amount
        allowed = in_all <= 6 if not client else in_all <= 5 and held[client] + amount <= 3
        assert shares.has_room(client, amount) is allowed
        try:
            shares.acquire(client, amount)
        except RegistryError:
            assert not allowed
        else:
            assert allowed
            held[client] += amount
        assert shares.used == sum(held.values())
        assert {client: shares.held_by(client) for client in held} == held
        assert set(shares.holders) == {client for client, amount in held.items() if amount}


def test_the_refusal_of_a_client_names_its_share_and_the_setting() -> None:
    shares = ClientShares("open uploads", 9, 2, share_setting="MAX_UPLOADS_PER_CLIENT", retry_after=5)
    shares.acquire("192.0.2.1", 2)
    with pytest.raises(TooManyRequests) as caught:
        shares.acquire("192.0.2.1")
    assert caught.value.message == (
        "192.0.2.1 has 2 of the 2 open uploads that one client may have (MAX_UPLOADS_PER_CLIENT)"
    )
    assert caught.value.headers == (("Retry-After", "5"),)
    shares.acquire("192.0.2.2")


def test_the_refusal_of_all_names_the_bound_and_the_setting() -> None:
    shares = ClientShares("open uploads", 3, 2, limit_setting="MAX_UPLOADS")
    shares.acquire("192.0.2.1", 2)
    shares.acquire("192.0.2.2")
    with pytest.raises(ServiceOverloaded) as caught:
        shares.acquire("192.0.2.3")
    assert caught.value.message == (
        "all clients together have 3 of the 3 open uploads that they may have (MAX_UPLOADS)"
    )
    assert caught.value.headers == (("Retry-After", "1"),)


def test_reports_who_holds_most_and_what_was_refused() -> None:
    shares = ClientShares("open uploads", 9, 3)
    for client in ("a", "b", "b", "b"):
        shares.acquire(client)
    with pytest.raises(TooManyRequests):
        shares.acquire("b")
    assert shares.report() == {
        "name": "open uploads",
        "used": 4,
        "limit": 9,
        "share": 3,
        "refused": 1,
        "clients": {"b": 3, "a": 1},
    }


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("-", "-"),
        ("", ""),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("no:address", "no:address"),
        ("user alice", "user alice"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, key: str) -> None:
    assert client_key(address) == key
    assert client_key(key) == key


def test_addresses_of_one_ipv6_network_have_one_share() -> None:
    shares = ClientShares("connections", 9, 2)
    shares.acquire("2001:db8::1")
    shares.acquire("2001:db8::2")
    assert not shares.has_room("2001:db8::3")
    assert shares.has_room("2001:db8:0:1::1")
    shares.release("2001:db8::2")
    assert shares.has_room("2001:db8::3")
