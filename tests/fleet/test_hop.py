"""The field by which a member tells that it is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.fleet.hop import CDN_ID, Hop, HopKind, HopLogin, parse_hop

hops = st.builds(
    Hop,
    st.sampled_from(["10.0.0.1:3128", "[fd00::1]:3128", "127.0.0.12:80"]),
    st.sampled_from(HopLogin),
    st.sampled_from(HopKind),
)


@given(hops)
def test_what_a_member_sends_is_read_back(hop: Hop) -> None:
    assert parse_hop(str(hop)) == hop


@given(hops)
def test_elements_of_other_networks_are_ignored(hop: Hop) -> None:
    assert parse_hop(f"foo123.foocdn.example, {hop}, anotherexample; abc=123") == hop


@pytest.mark.parametrize(
    "value",
    [
        "",
        "docker-registry-proxy",
        'docker-registry-proxy;from="10.0.0.1:3128"',
        'docker-registry-proxy;from="10.0.0.1:3128";login=root;as=owner',
        'docker-registry-proxy;from="10.0.0.1:3128";login=none;as=king',
        'docker-registry-proxy;from="10.0.0.1:3128";login=none;as=owner;login=client',
        'docker-registry-proxy;from="10.0.0.1:3128";login=none;as=owner;more=1',
        'docker-registry-proxy;from="a b";login=none;as=owner',
        'docker-registry-proxy;from="10.0.0.1:3128";login=none;as=owner x',
        'docker-registry-proxy-2;from="10.0.0.1:3128";login=none;as=owner',
        f"{Hop('10.0.0.1:3128')}, {Hop('10.0.0.2:3128')}",
        f"{Hop('10.0.0.1:3128')}, {'x' * 1024}",
    ],
    ids=range(12),
)
def test_anything_else_is_not_a_member(value: str) -> None:
    assert parse_hop(value) is None


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_error(value: str) -> None:
    parse_hop(value)
    parse_hop(f"docker-registry-proxy{value}")


@pytest.mark.parametrize(
    "sender",
    [
        "10.0.0.1:3128\r\nX-Evil: 1",
        "10.0.0.1 3128",
        '10.0.0.1"',
        "10.0.0.1;login=client",
        "10.0.0.1%0d%0a",
        "\x00",
        "é",
    ],
    ids=["lines", "space", "quote", "parameter", "encoded", "nul", "letter"],
)
def test_a_sender_is_an_address_and_nothing_else(sender: str) -> None:
    assert parse_hop(str(Hop(sender))) is None


@pytest.mark.parametrize(
    "value",
    [
        f"{CDN_ID};from=a;login=none;as=owner" + ";a=b" * 100_000,
        f"{CDN_ID}" + " \t" * 100_000 + ";from=a",
        f"{CDN_ID};" * 100_000,
        "," * 1_000_000,
        f'{CDN_ID};from="{"a" * 1_000_000}";login=none;as=owner',
    ],
    ids=["parameters", "spaces", "twice", "commas", "sender"],
)
def test_huge_fields_are_none(value: str) -> None:
    assert parse_hop(value) is None
