"""Which requests the access rules let through, and what a refusal says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.errors import Denied
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.oci.names import Host
from dockerproxy.proxy.policy import Policy


def policy(
    clients: str = "private loopback link-local",
    ports: tuple[int, ...] = (443,),
    allow: str = "all",
    deny: str = "loopback link-local metadata",
) -> Policy:
    return Policy(AddressSet.parse(clients), frozenset(ports), Destinations.parse(allow), Destinations.parse(deny))


def host(text: str) -> Host:
    return Host.parse(text)


@pytest.mark.parametrize("address", ["192.168.1.5", "127.0.0.1", "::1", "::ffff:10.0.0.1", "fe80::1%eth0", "fd00::1"])
def test_clients_of_private_networks_are_let_in(address: str) -> None:
    policy().check_client(address)


@pytest.mark.parametrize(
    "address", ["203.0.113.5", "2001:db8::1", "::ffff:203.0.113.5", "2002:a00:1::1", "64:ff9b::a00:1"]
)
def test_other_clients_are_not(address: str) -> None:
    with pytest.raises(Denied) as caught:
        policy().check_client(address)
    assert str(caught.value) == f"ALLOW_CLIENTS has no entry for your address, {address}."


def test_a_peer_without_an_address_is_no_client() -> None:
    with pytest.raises(Denied, match="ALLOW_CLIENTS"):
        policy(clients="all").check_client("/run/socket")


def test_tunnels_go_to_the_ports_of_the_settings() -> None:
    rules = policy(ports=(443, 8443))
    rules.check_port(host("example.com:8443"))
    with pytest.raises(Denied) as caught:
        rules.check_port(host("example.com:25"))
    assert str(caught.value) == "TUNNEL_PORTS has no entry for port 25."


@pytest.mark.parametrize(
    ("port", "fine"), [(80, True), (443, True), (1024, True), (65535, True), (25, False), (1023, False)]
)
def test_plain_http_goes_to_its_port_and_unprivileged_ones(port: int, fine: bool) -> None:
    if fine:
        policy().check_http_port(Host("example.com", port))
    else:
        with pytest.raises(Denied, match="TUNNEL_PORTS"):
            policy().check_http_port(Host("example.com", port))


def test_a_name_that_leads_to_a_metadata_service_does_not_get_through() -> None:
    rules = policy()
    rules.check_name(host("evil.example"))
    for address in ("169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"):
        with pytest.raises(Denied) as caught:
            rules.check_address(host("evil.example"), address)
        # "link-local" is the first entry that has it. The address itself is nothing that the client needs to learn.
        assert str(caught.value) == "TUNNEL_DENY (link-local) forbids connections to evil.example:443."


@pytest.mark.parametrize("literal", ["127.0.0.1", "[::1]", "0.0.0.0", "[::]", "169.254.169.254", "[::ffff:127.0.0.1]"])
def test_an_address_for_a_name_is_judged_before_anything_is_resolved(literal: str) -> None:
    with pytest.raises(Denied, match="TUNNEL_DENY"):
        policy().check_name(host(literal))


def test_a_name_may_be_denied() -> None:
    rules = policy(deny="*.example.com")
    for check in (
        lambda: rules.check_name(host("www.example.com")),
        lambda: rules.check_address(host("www.example.com"), "192.0.2.1"),
    ):
        with pytest.raises(Denied) as caught:
            check()
        assert str(caught.value) == "TUNNEL_DENY (*.example.com) forbids connections to www.example.com:443."
    rules.check_address(host("example.com"), "192.0.2.1")


def test_a_name_may_be_allowed() -> None:
    rules = policy(allow=".example.com 192.0.2.0/24")
    rules.check_address(host("www.example.com"), "198.51.100.1")
    rules.check_address(host("other.example"), "192.0.2.1")
    rules.check_name(host("other.example"))  # its address may be in the network
    with pytest.raises(Denied) as caught:
        rules.check_address(host("other.example"), "198.51.100.1")
    assert str(caught.value) == "TUNNEL_ALLOW has no entry for other.example:443."


def test_an_allowed_name_does_not_open_denied_addresses() -> None:
    with pytest.raises(Denied, match="TUNNEL_DENY"):
        policy(allow="intern.example").check_address(host("intern.example"), "127.0.0.1")


def test_a_list_of_names_refuses_others_before_they_are_resolved() -> None:
    rules = policy(allow="example.com")
    rules.check_name(host("example.com"))
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        rules.check_name(host("other.example"))


def test_none_denies_nothing_and_allows_nothing() -> None:
    policy(deny="none").check_address(host("localhost"), "127.0.0.1")
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        policy(allow="none").check_address(host("example.com"), "192.0.2.1")


def test_what_is_no_address_is_not_allowed() -> None:
    with pytest.raises(Denied, match="TUNNEL_ALLOW"):
        policy().check_address(host("example.com"), "/run/socket")


NAMES = st.sampled_from(["example.com", "www.example.com", "other.example"])
WORDS = st.sampled_from(
    ["example.com", "*.example.com", ".example.com", "10.0.0.0/8", "private", "loopback", "all", "none"]
)
LISTS = st.lists(WORDS, max_size=3).map(" ".join)
ADDRESSES = st.sampled_from(["10.0.0.1", "192.168.0.1", "127.0.0.1", "0.0.0.0", "203.0.113.1", "2001:db8::1"])


def passes(rules: Policy, name: str, address: str) -> bool:
    try:
        rules.check_address(host(name), address)
    except Denied:
        return False
    return True


@given(LISTS, LISTS, NAMES, ADDRESSES)
def test_allowed_is_what_allow_has_and_deny_has_not(allow: str, deny: str, name: str, address: str) -> None:
    allowed, denied = Destinations.parse(allow), Destinations.parse(deny)
    wanted = (allowed.match_name(name) or allowed.match_address(address, exactly=True)) and not (
        denied.match_name(name) or denied.match_address(address)
    )
    assert passes(policy(allow=allow, deny=deny), name, address) == bool(wanted)


@given(LISTS, LISTS, WORDS, NAMES, ADDRESSES)
def test_a_further_entry_to_deny_never_opens_anything(
    allow: str, deny: str, more: str, name: str, address: str
) -> None:
    if passes(policy(allow=allow, deny=f"{deny} {more}"), name, address):
        assert passes(policy(allow=allow, deny=deny), name, address)


@given(LISTS, LISTS, NAMES, ADDRESSES)
def test_a_name_refused_early_would_be_refused_with_every_address(
    allow: str, deny: str, name: str, address: str
) -> None:
    rules = policy(allow=allow, deny=deny)
    try:
        rules.check_name(host(name))
    except Denied:
        assert not passes(rules, name, address)
