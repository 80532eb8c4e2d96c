"""Tests for the access policy and its error messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import Denied, DestinationForbidden
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.oci.names import Host
from dockerproxy.proxy.policy import OwnAddressDenied, Policy

OWN_ADDRESSES = ("10.9.8.7", "172.17.0.1", "2001:db8::7")


def make_policy(
    clients: str = "private loopback link-local",
    ports: tuple[int, ...] = (443,),
    allow: str = "all",
    deny: str = "loopback link-local metadata",
) -> Policy:
    return Policy(
        AddressSet.parse(clients),
        frozenset(ports),
        Destinations.parse(allow),
        Destinations.parse(deny),
        lambda address: str(address) in OWN_ADDRESSES,
    )


def parse_host(text: str) -> Host:
    return Host.parse(text)


@pytest.mark.parametrize("address", ["192.168.1.5", "127.0.0.1", "::1", "::ffff:10.0.0.1", "fe80::1%eth0", "fd00::1"])
def test_private_clients_are_allowed(address: str) -> None:
    make_policy().check_client(address)


@pytest.mark.parametrize(
    "address", ["203.0.113.5", "2001:db8::1", "::ffff:203.0.113.5", "2002:a00:1::1", "64:ff9b::a00:1"]
)
def test_other_clients_are_denied(address: str) -> None:
    with pytest.raises(Denied) as caught:
        make_policy().check_client(address)
    assert str(caught.value) == f"ALLOW_CLIENTS has no entry for your address, {address}."


def test_peer_without_an_ip_address_is_denied() -> None:
    with pytest.raises(Denied, match="ALLOW_CLIENTS"):
        make_policy(clients="all").check_client("/run/socket")


def test_tunnels_may_use_only_tunnel_ports() -> None:
    rules = make_policy(ports=(443, 8443))
    rules.check_port(parse_host("example.com:8443"))
    with pytest.raises(Denied) as caught:
        rules.check_port(parse_host("example.com:25"))
    assert str(caught.value) == "TUNNEL_PORTS has no entry for port 25."


@pytest.mark.parametrize(
    ("port", "allowed"), [(80, True), (443, True), (1024, True), (65535, True), (25, False), (1023, False)]
)
def test_plain_http_may_use_unprivileged_ports(port: int, allowed: bool) -> None:
    if allowed:
        make_policy().check_http_port(Host("example.com", port))
    else:
        with pytest.raises(Denied, match="TUNNEL_PORTS"):
            make_policy().check_http_port(Host("example.com", port))


def test_name_that_resolves_to_a_metadata_service_is_denied() -> None:
    rules = make_policy()
    rules.check_name(parse_host("evil.example"))
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"):
        with pytest.raises(Denied) as caught:
            rules.check_address(parse_host("evil.example"), address)
        # "link-local" is the first entry that matches. The error does not reveal the address to the client.
        assert str(caught.value) == "TUNNEL_DENY (link-local) forbids connections to evil.example:443."


@pytest.mark.parametrize("literal", ["127.0.0.1", "[::1]", "0.0.0.0", "[::]", "169.254.169.254", "[::ffff:127.0.0.1]"])
def test_literal_addresses_are_checked_before_resolution(literal: str) -> None:
    with pytest.raises(Denied, match="TUNNEL_DENY"):
        make_policy().check_name(parse_host(literal))


@pytest.mark.parametrize(
    "address",
    "10.9.8.7 172.17.0.1 2001:db8::7 ::ffff:10.9.8.7 64:ff9b::a09:807 64:ff9b:1::a09:807 2002:a09:807::1".split(),
)
def test_every_address_of_this_machine_is_loopback(address: str) -> None:
    rules, host = make_policy(), parse_host("evil.example")
    with pytest.raises(OwnAddressDenied) as caught:
        rules.check_address(host, address)
    assert str(caught.value) == "TUNNEL_DENY (loopback) forbids connections to evil.example:443."
    assert caught.value.address == address
    with pytest.raises(OwnAddressDenied):
        rules.check_name(Host.parse(f"[{address}]" if ":" in address else address))
    with pytest.raises(DestinationForbidden, match="loopback"):
        rules.check_upstream(address)


def test_networks_in_tunnel_deny_leave_other_addresses_of_this_machine() -> None:
    rules = make_policy(deny="127.0.0.0/8 ::1 link-local metadata")
    rules.check_address(parse_host("own.example"), "10.9.8.7")
    rules.check_upstream("10.9.8.7")
    with pytest.raises(Denied, match="127"):
        rules.check_address(parse_host("own.example"), "127.0.0.1")


def test_loopback_in_tunnel_allow_means_this_machine() -> None:
    rules = make_policy(allow="loopback", deny="none")
    for address in ("127.0.0.1", "10.9.8.7"):
        rules.check_address(parse_host("own.example"), address)
    for address in ("192.0.2.1", "64:ff9b::a09:807"):  # anyone can make up an address that embeds ours
        with pytest.raises(Denied, match="TUNNEL_ALLOW"):
            rules.check_address(parse_host("own.example"), address)


def test_deny_wins_over_an_own_address_in_tunnel_allow() -> None:
    with pytest.raises(OwnAddressDenied):
        make_policy(allow="10.9.8.7").check_address(parse_host("own.example"), "10.9.8.7")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("localhost", "loopback"),
        ("x.LOCALHOST.", "loopback"),
        ("localhost.localdomain", "loopback"),
        ("metadata.google.internal", "metadata"),
        ("Metadata.Google.Internal.", "metadata"),
        ("instance-data", "metadata"),
        ("forbidden.example", "forbidden.example"),
        ("169.254.169.254", "link-local"),
    ],
)
def test_names_that_an_upstream_proxy_would_resolve(name: str, entry: str) -> None:
    rules = make_policy(deny="loopback link-local metadata forbidden.example")
    host = parse_host(name)
    for check in (lambda: rules.check_name(host), lambda: rules.check_address(host, host.name)):
        with pytest.raises(Denied) as caught:
            check()
        assert f"TUNNEL_DENY ({entry})" in str(caught.value)
    with pytest.raises(DestinationForbidden) as forbidden:
        rules.check_upstream(host.name)
    assert f"TUNNEL_DENY ({entry})" in str(forbidden.value)


def test_other_names_go_through_an_upstream_proxy() -> None:
    make_policy().check_address(parse_host("cdn.example"), "cdn.example")
    make_policy().check_upstream("cdn.example")
    make_policy(allow="cdn.example").check_address(parse_host("cdn.example"), "cdn.example")


def test_a_name_that_cannot_be_compared_with_addresses_is_not_allowed() -> None:
    """TUNNEL_ALLOW has networks only, and nobody here knows the address that the upstream proxy will find."""
    rules = make_policy(allow="192.0.2.0/24")
    rules.check_name(parse_host("cdn.example"))
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        rules.check_address(parse_host("cdn.example"), "cdn.example")


def test_well_known_names_are_not_allowed_by_a_word_in_tunnel_allow() -> None:
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        make_policy(allow="loopback", deny="none").check_address(parse_host("localhost"), "192.0.2.1")


def test_denied_names_are_refused() -> None:
    rules = make_policy(deny="*.example.com")
    for check in (
        lambda: rules.check_name(parse_host("www.example.com")),
        lambda: rules.check_address(parse_host("www.example.com"), "192.0.2.1"),
    ):
        with pytest.raises(Denied) as caught:
            check()
        assert str(caught.value) == "TUNNEL_DENY (*.example.com) forbids connections to www.example.com:443."
    rules.check_address(parse_host("example.com"), "192.0.2.1")


def test_allow_list_matches_name_or_address() -> None:
    rules = make_policy(allow=".example.com 192.0.2.0/24")
    rules.check_address(parse_host("www.example.com"), "198.51.100.1")
    rules.check_address(parse_host("other.example"), "192.0.2.1")
    rules.check_name(parse_host("other.example"))  # because its address may be in the network
    with pytest.raises(Denied) as caught:
        rules.check_address(parse_host("other.example"), "198.51.100.1")
    assert str(caught.value) == "TUNNEL_ALLOW has no entry for other.example:443."


def test_deny_wins_over_an_allowed_name() -> None:
    with pytest.raises(Denied, match="TUNNEL_DENY"):
        make_policy(allow="intern.example").check_address(parse_host("intern.example"), "127.0.0.1")


def test_allow_list_of_names_is_checked_before_resolution() -> None:
    rules = make_policy(allow="example.com")
    rules.check_name(parse_host("example.com"))
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        rules.check_name(parse_host("other.example"))


def test_none_matches_nothing() -> None:
    make_policy(deny="none").check_address(parse_host("localhost"), "127.0.0.1")
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        make_policy(allow="none").check_address(parse_host("example.com"), "192.0.2.1")


def test_non_address_is_denied() -> None:
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        make_policy().check_address(parse_host("example.com"), "/run/socket")


NAMES = st.sampled_from(["example.com", "www.example.com", "other.example"])
ENTRIES = st.sampled_from(
    ["example.com", "*.example.com", ".example.com", "10.0.0.0/8", "private", "loopback", "all", "none"]
)
LISTS = st.lists(ENTRIES, max_size=3).map(" ".join)
ADDRESSES = st.sampled_from(["10.0.0.1", "192.168.0.1", "127.0.0.1", "0.0.0.0", "203.0.113.1", "2001:db8::1"])


def is_allowed(rules: Policy, name: str, address: str) -> bool:
    try:
        rules.check_address(parse_host(name), address)
    except Denied:
        return False
    return True


@given(LISTS, LISTS, NAMES, ADDRESSES)
def test_allowed_means_in_allow_and_not_in_deny(allow: str, deny: str, name: str, address: str) -> None:
    allowed, denied = Destinations.parse(allow), Destinations.parse(deny)
    expected = (allowed.match_name(name) or allowed.match_address(address, exact=True)) and not (
        denied.match_name(name) or denied.match_address(address)
    )
    assert is_allowed(make_policy(allow=allow, deny=deny), name, address) == bool(expected)


@given(LISTS, LISTS, ENTRIES, NAMES, ADDRESSES)
def test_adding_a_deny_entry_never_allows_more(allow: str, deny: str, more: str, name: str, address: str) -> None:
    if is_allowed(make_policy(allow=allow, deny=f"{deny} {more}"), name, address):
        assert is_allowed(make_policy(allow=allow, deny=deny), name, address)


@given(LISTS, LISTS, NAMES, ADDRESSES)
def test_name_check_agrees_with_address_check(allow: str, deny: str, name: str, address: str) -> None:
    rules = make_policy(allow=allow, deny=deny)
    try:
        rules.check_name(parse_host(name))
    except Denied:
        assert not is_allowed(rules, name, address)


@pytest.mark.parametrize(
    ("name", "address", "is_allowed"),
    [
        ("a.pkg.dev", "203.0.113.5", True),
        ("a.pkg.dev", "10.1.2.3", True),
        ("a.pkg.dev", "a.pkg.dev", True),  # an upstream proxy resolves it
        ("a.pkg.dev", "127.0.0.1", False),
        ("a.pkg.dev", "169.254.169.254", False),
        ("a.pkg.dev", OWN_ADDRESSES[0], False),
        ("denied.pkg.dev", "203.0.113.5", False),
        ("denied.pkg.dev", "denied.pkg.dev", False),
    ],
)
def test_a_host_that_a_wildcard_covers(name: str, address: str, is_allowed: bool) -> None:
    """A client chose it, and its name may lead anywhere."""
    policy = make_policy(allow="none", deny="loopback link-local metadata denied.pkg.dev")
    if is_allowed:
        policy.check_covered(parse_host(name), address)
    else:
        with pytest.raises((Denied, DestinationForbidden), match="TUNNEL_DENY"):
            policy.check_covered(parse_host(name), address)
