"""Tests for address sets and host name patterns, including attempts to circumvent them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.net.addresses import AddressSet, Destinations, redacted_repr


def mapped(address: IPv4Address) -> str:
    return str(IPv6Address(0xFFFF << 32 | int(address)))


def nat64(address: IPv4Address) -> str:
    return str(IPv6Address(0x0064FF9B << 96 | int(address)))


def six_to_four(address: IPv4Address) -> str:
    return str(IPv6Address(0x2002 << 112 | int(address) << 80 | 1))


IPV4 = st.ip_addresses(v=4)
NETWORK = st.builds(lambda address, prefix: str(ip_network((address, prefix), strict=False)), IPV4, st.integers(0, 32))


@pytest.mark.parametrize(
    ("text", "address", "entry"),
    [
        ("10.0.0.0/8", "10.255.0.1", "10.0.0.0/8"),
        ("10.0.0.0/8", "11.0.0.1", None),
        ("192.0.2.7", "192.0.2.7", "192.0.2.7"),
        ("192.0.2.7", "192.0.2.8", None),
        ("2001:db8::/32", "2001:db8:1::1", "2001:db8::/32"),
        ("10.0.0.0/8 Private", "192.168.1.1", "Private"),
        ("private", "172.31.255.255", "private"),
        ("private", "172.32.0.0", None),
        ("private", "100.127.0.1", "private"),
        ("private", "fd12::1", "private"),
        ("loopback", "127.8.8.8", "loopback"),
        ("loopback", "::1", "loopback"),
        ("link-local", "169.254.1.1", "link-local"),
        ("link-local", "fe80::1%eth0", "link-local"),
        ("metadata", "169.254.169.254", "metadata"),
        ("metadata", "fd00:ec2::254", "metadata"),
        ("metadata", "100.100.100.200", "metadata"),
        ("metadata", "192.0.0.192", "metadata"),
        ("metadata", "168.63.129.16", "metadata"),
        ("metadata", "fd00:ec2::23", "metadata"),
        ("metadata", "fd20:ce::254", "metadata"),
        ("metadata", "fd00:c1::a9fe:a9fe", "metadata"),
        ("metadata", "fd00:42::42", "metadata"),
        ("metadata", "fd00:a9fe:a9fe::1", "metadata"),
        ("metadata", "fd00:100::100:200", "metadata"),
        ("metadata", "169.254.169.253", None),
        ("metadata", "fd20:ce::1", None),
        ("all", "203.0.113.1", "all"),
        ("all", "2001:db8::1", "all"),
        ("none", "203.0.113.1", None),
        ("", "203.0.113.1", None),
        ("::ffff:10.0.0.0/104", "10.1.2.3", "::ffff:10.0.0.0/104"),
    ],
)
def test_match(text: str, address: str, entry: str | None) -> None:
    assert AddressSet.parse(text).match(address) == entry
    assert (address in AddressSet.parse(text)) == (entry is not None)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("loopback", "0.0.0.0"),
        ("loopback", "::"),
        ("127.0.0.0/8", "0.0.0.0"),
        ("::1", "::"),
        ("127.0.0.1", "::ffff:0.0.0.0"),
        ("metadata", "::ffff:169.254.169.254"),
        ("metadata", "64:ff9b::a9fe:a9fe"),
        ("metadata", "64:ff9b:1::a9fe:a9fe"),
        ("metadata", "64:ff9b:1:a9fe:a9:fe00::"),  # behind 48 bits (RFC 6052, section 2.2)
        ("metadata", "64:ff9b:1:a9:fe:a9fe::"),  # behind 56 bits
        ("metadata", "64:ff9b:1:abcd:a9:fea9:fe00:0"),  # behind 64 bits
        ("metadata", "64:ff9b:1:abcd::a9fe:a9fe"),  # behind 96 bits
        ("metadata", "2002:a9fe:a9fe::1"),
        ("loopback", "64:ff9b::"),
    ],
)
def test_embedded_ipv4_addresses_match(text: str, address: str) -> None:
    assert address in AddressSet.parse(text)


@pytest.mark.parametrize("address", ["64:ff9b:1::5db8:d822", "64:ff9b:1:5db8:d8:2200::", "64:ff9b:1:fffe::5db8:d822"])
def test_a_local_nat64_prefix_is_no_loopback_address(address: str) -> None:
    """The positions for shorter prefixes hold zeros, which are no address that a gateway forwards to."""
    assert AddressSet.parse("loopback link-local metadata").match(address) is None


@pytest.mark.parametrize(
    ("text", "address", "entry"),
    [
        ("metadata Loopback", "10.9.8.7", "Loopback"),
        ("loopback", "10.9.8.8", None),
        ("loopback", "64:ff9b::a09:807", "loopback"),
        ("loopback", "::ffff:10.9.8.7", "loopback"),
        ("127.0.0.0/8 private all", "10.9.8.7", None),
        ("", "10.9.8.7", None),
    ],
)
def test_match_own(text: str, address: str, entry: str | None) -> None:
    assert AddressSet.parse(text).match_own(address, lambda candidate: str(candidate) == "10.9.8.7") == entry


@given(NETWORK, IPV4)
def test_embedded_addresses_match_like_the_ipv4_address(network: str, address: IPv4Address) -> None:
    rules = AddressSet.parse(network)
    if rules.match(str(address)) is not None:
        for embed in (mapped, nat64, six_to_four):
            assert rules.match(embed(address)) == network


@given(NETWORK, IPV4)
def test_exact_match_accepts_only_ipv4_mapped_addresses(network: str, address: IPv4Address) -> None:
    rules = AddressSet.parse(network)
    assert rules.match(mapped(address), exact=True) == rules.match(str(address), exact=True)
    assert rules.match(nat64(address), exact=True) is None
    assert rules.match(six_to_four(address), exact=True) is None


@given(NETWORK, IPV4)
def test_exact_match_equals_network_membership(network: str, address: IPv4Address) -> None:
    assert (AddressSet.parse(network).match(str(address), exact=True) is not None) == (address in ip_network(network))


@pytest.mark.parametrize("entry", ["10.0.0.256", "10.0.0.0/33", "localnet", "1.2.3", "10.0.0.0/", "/8"])
def test_invalid_entry_is_named_in_the_error(entry: str) -> None:
    with pytest.raises(ValueError, match="is not an address") as caught:
        AddressSet.parse(f"127.0.0.1 {entry}")
    assert repr(entry) in str(caught.value)


def test_host_bits_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"'10.1.2.3/8' has host bits set; did you mean 10.0.0.0/8\?"):
        AddressSet.parse("10.1.2.3/8")


def test_match_rejects_a_host_name() -> None:
    with pytest.raises(ValueError, match="example"):
        AddressSet.parse("all").match("example.com")


@pytest.mark.parametrize(
    ("text", "name", "entry"),
    [
        ("example.com", "example.com", "example.com"),
        ("example.com", "www.example.com", None),
        ("example.com", "notexample.com", None),
        ("*.example.com", "www.example.com", "*.example.com"),
        ("*.example.com", "a.b.example.com", "*.example.com"),
        ("*.example.com", "example.com", None),
        ("*.example.com", "notexample.com", None),
        (".example.com", "example.com", ".example.com"),
        (".example.com", "www.example.com", ".example.com"),
        (".example.com", "notexample.com", None),
        ("Example.COM.", "example.com", "Example.COM."),
        ("private 10.0.0.0/8", "example.com", None),
        ("none", "example.com", None),
        ("private All", "example.com", "All"),
        ("127.0.0.1", "127.0.0.1", None),
        ("loopback", "localhost", "loopback"),
        ("loopback", "notlocalhost", None),
        ("Metadata", "metadata.google.internal", "Metadata"),
        ("loopback", "metadata.google.internal", None),
    ],
)
def test_match_name(text: str, name: str, entry: str | None) -> None:
    assert Destinations.parse(text).match_name(name) == entry


def test_match_address() -> None:
    destinations = Destinations.parse("*.example.com metadata 10.0.0.0/8 loopback")
    assert destinations.match_address("10.1.1.1") == "10.0.0.0/8"
    assert destinations.match_address("2002:a9fe:a9fe::1") == "metadata"
    assert destinations.match_address("2002:a9fe:a9fe::1", exact=True) is None
    assert destinations.match_address("192.0.2.1") is None


def test_names_only() -> None:
    assert Destinations.parse("example.com none").names_only
    assert not Destinations.parse("example.com 10.0.0.0/8").names_only


@pytest.mark.parametrize(
    "entry",
    [
        "*",
        "*example.com",
        "**.example.com",
        "..example.com",
        "example.com:443",
        "a/b",
        "*.10.0.0.1",
        "exa mple..com",
        "10.0.0.0/40",
    ],
)
def test_invalid_destination_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host name such as"):
        Destinations.parse(entry)


def test_redacted_repr_hides_credentials_and_truncates() -> None:
    assert redacted_repr("http://user:secret@proxy") == "'…@proxy'"
    assert len(redacted_repr("x" * 5000)) < 110
