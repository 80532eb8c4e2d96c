"""Sets of network addresses and host names, as the settings write them. Pure: nothing here resolves a name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from attrs import frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Host

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def _parse_networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


_KEYWORDS = {
    "all": _parse_networks("0.0.0.0/0", "::/0"),
    "none": (),
    # RFC 1918, RFC 6598 (carrier-grade NAT, which overlay networks borrow) and RFC 4193.
    "private": _parse_networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),
    # Linux takes a connection to the unspecified address as one to itself.
    "loopback": _parse_networks("127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"),
    "link-local": _parse_networks("169.254.0.0/16", "fe80::/10"),
    # Where clouds answer with their machines' credentials: AWS, GCP, Azure and most others; AWS over IPv6; Alibaba;
    # Oracle; Azure's wire server.
    "metadata": _parse_networks("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"),
}

_ADDRESS_SYNTAX = f"an address, a network such as 10.0.0.0/8 or one of {', '.join(_KEYWORDS)}"
_DESTINATION_SYNTAX = f"a host name such as example.com or *.example.com, {_ADDRESS_SYNTAX}"

_IPV4_MAPPED = IPv6Network("::ffff:0:0/96")
# RFC 6052 and RFC 8215: a NAT64 gateway sends these on to the IPv4 address in the last 32 bits.
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))


def redacted_repr(text: str) -> str:
    """Return `text` for an error: in quotes, short, and without what stands before an ``@``, which may be a login."""
    _, at, rest = text.rpartition("@")
    text = f"…@{rest}" if at else text
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


@frozen
class AddressSet:
    """Networks, each under the word that the user wrote for it: `entries` are (word, networks)."""

    entries: tuple[tuple[str, tuple[Network, ...]], ...] = ()

    @classmethod
    def parse(cls, text: str) -> AddressSet:
        """Return the set of addresses, networks and keywords that `text` names, separated by spaces.

        Raise `ValueError` with a sentence about the first word that is none.
        """
        return cls(tuple((entry, _parse_entry(entry, _ADDRESS_SYNTAX)) for entry in text.split()))

    def match(self, address: str, *, exact: bool = False) -> str | None:
        """Return the word under which `address` is in the set, or None. Raise `ValueError` where it is no address.

        An IPv6 address that leads to an IPv4 address (6to4, NAT64) is in the set by that one as well, and the
        unspecified address by the loopback one: what a deny list has to ask. An allow list asks `exactly`, which
        leaves these aside: they can be had by anyone who writes them. IPv4-mapped addresses are IPv4 either way.
        """
        parsed = _parse_address(
            address.partition("%")[0]
        )  # a zone (fe80::1%eth0) is no part of what the rules are about
        candidates = (parsed,) if exact else tuple(_effective_addresses(parsed))
        for entry, networks in self.entries:
            if any(candidate in network for network in networks for candidate in candidates):
                return entry
        return None

    def __contains__(self, address: str) -> bool:
        return self.match(address) is not None


@frozen
class HostPattern:
    """Host names: `example.com` is that name alone, `*.example.com` every name below it, `.example.com` both."""

    entry: str
    name: str
    matches_apex: bool
    matches_subdomains: bool

    @classmethod
    def parse(cls, entry: str) -> HostPattern:
        """Return the pattern written as `word`, or raise `NameInvalid`."""
        wildcard = entry.startswith("*.")
        name = entry.removeprefix("*" if wildcard else "").removeprefix(".")
        host = Host.parse(name)
        if host.is_address or ":" in name:
            raise NameInvalid(f"{entry[:300]!r} is not a host name")
        return cls(entry, host.name, matches_apex=not wildcard, matches_subdomains=name != entry)

    def matches(self, name: str) -> bool:
        """Whether the pattern has `name` (lower-case)."""
        return (self.matches_apex and name == self.name) or (self.matches_subdomains and name.endswith("." + self.name))


@frozen
class Destinations:
    """Where a connection may or may not go: addresses, and patterns of host names."""

    addresses: AddressSet = AddressSet()
    names: tuple[HostPattern, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Destinations:
        """Return the destinations that `text` names, separated by spaces.

        Raise `ValueError` with a sentence about the first word that is none.
        """
        addresses, names = [], []
        for entry in text.split():
            if entry.lower() in _KEYWORDS:
                addresses.append((entry, _KEYWORDS[entry.lower()]))
                continue
            try:
                names.append(HostPattern.parse(entry))
            except NameInvalid:
                addresses.append((entry, _parse_entry(entry, _DESTINATION_SYNTAX)))
        return cls(AddressSet(tuple(addresses)), tuple(names))

    def match_name(self, name: str) -> str | None:
        """Return the word that names the host `name` (lower-case, as `Host.name`), or None."""
        for pattern in self.names:
            if pattern.matches(name):
                return pattern.entry
        return next((entry for entry, _ in self.addresses.entries if entry.lower() == "all"), None)

    def match_address(self, address: str, *, exact: bool = False) -> str | None:
        """Return the word that names `address`, or None; see `AddressSet.rule_for`."""
        return self.addresses.match(address, exact=exact)

    @property
    def names_only(self) -> bool:
        """Whether no address matches, so that a name alone decides."""
        return not any(networks for _, networks in self.addresses.entries)


def _parse_entry(entry: str, syntax: str) -> tuple[Network, ...]:
    networks = _KEYWORDS.get(entry.lower())
    if networks is not None:
        return networks
    try:
        network = ip_network(entry, strict=False)
    except ValueError:
        raise ValueError(f"{redacted_repr(entry)} is not {syntax}") from None
    if "/" in entry and network.network_address != ip_address(entry.partition("/")[0]):
        raise ValueError(f"{redacted_repr(entry)} has bits beyond its prefix, the network is {network}")
    if isinstance(network, IPv6Network) and network.subnet_of(_IPV4_MAPPED):
        mapped = IPv4Address(int(network.network_address) & 0xFFFFFFFF)
        return (IPv4Network((mapped, network.prefixlen - 96)),)
    return (network,)


@lru_cache(1024)  # clients come again, and `ipaddress` takes 10 µs for each
def _parse_address(address: str) -> Address:
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return parsed if mapped is None else mapped


def _effective_addresses(address: Address) -> Iterator[Address]:
    yield address
    embedded: IPv4Address | None = None
    if isinstance(address, IPv6Address):
        embedded = address.sixtofour
        if any(address in network for network in _NAT64):
            embedded = IPv4Address(int(address) & 0xFFFFFFFF)
    if embedded is not None:
        yield from _effective_addresses(embedded)
    elif address.is_unspecified:
        yield IPv4Address("127.0.0.1") if isinstance(address, IPv4Address) else IPv6Address("::1")
