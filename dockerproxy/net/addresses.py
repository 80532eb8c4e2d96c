"""Sets of network addresses and host names, as written in the settings. Pure: nothing here resolves a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    # On Linux a connection to the unspecified address reaches the machine itself.
    "loopback": _parse_networks("127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"),
    "link-local": _parse_networks("169.254.0.0/16", "fe80::/10"),
    # Cloud metadata services, which hand out a machine's credentials: AWS, GCP, Azure and most others; Alibaba; Oracle;
    # Azure's WireServer. Over IPv6: AWS, whose network has the EKS Pod Identity Agent, too; GCP; Oracle; Scaleway;
    # Akamai; Alibaba.
    "metadata": _parse_networks(
        "169.254.169.254", "100.100.100.200", "192.0.0.192", "168.63.129.16",
        "fd00:ec2::/32", "fd20:ce::254", "fd00:c1::a9fe:a9fe", "fd00:42::42", "fd00:a9fe:a9fe::1", "fd00:100::100:200",
    ),
}  # fmt: skip

_ADDRESS_SYNTAX = f"an address, a network such as 10.0.0.0/8 or one of {', '.join(_KEYWORDS)}"
_DESTINATION_SYNTAX = f"a host name such as example.com or *.example.com, {_ADDRESS_SYNTAX}"

_IPV4_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: a gateway forwards it to the IPv4 address in the last 32 bits
# RFC 8215: a network may use a prefix of any length within this one. RFC 6052, section 2.2, says which bytes hold the
# IPv4 address behind a prefix of 48, 56, 64 and 96 bits. The ninth byte (8) is never part of it.
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
_THIS_NETWORK = IPv4Network("0.0.0.0/8")
_NAT64_BYTES = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), (12, 13, 14, 15))


def _parse_names(*texts: str) -> tuple[HostPattern, ...]:
    return tuple(HostPattern.parse(text) for text in texts)


def redacted_repr(text: str) -> str:
    """Return `text` quoted for an error message: shortened, and without anything before an ``@``, maybe a login."""
    _, at, rest = text.rpartition("@")
    text = f"…@{rest}" if at else text
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


@frozen
class AddressSet:
    """A set of networks. Each item of `entries` is an entry as the user wrote it, and the networks that it means."""

    entries: tuple[tuple[str, tuple[Network, ...]], ...] = ()

    @classmethod
    def parse(cls, text: str) -> AddressSet:
        """Parse a list of addresses, networks and keywords, separated by spaces.

        Raise `ValueError` with one sentence about the first invalid entry.
        """
        return cls(tuple((entry, _parse_entry(entry, _ADDRESS_SYNTAX)) for entry in text.split()))

    def match(self, address: str, *, exact: bool = False) -> str | None:
        """Return the entry that contains `address`, or None. Raise `ValueError` if it is not an IP address.

        An IPv6 address that embeds an IPv4 address (6to4, NAT64) also matches as that address. The unspecified address
        also matches as the loopback address. Deny lists need both. Allow lists pass `exact`, which turns both off,
        because anybody can make up such an address. An IPv4-mapped address always counts as IPv4.
        """
        parsed = _parse_address(address.partition("%")[0])  # the rules ignore a zone (fe80::1%eth0)
        candidates = (parsed,) if exact else tuple(_effective_addresses(parsed))
        for entry, networks in self.entries:
            if any(candidate in network for network in networks for candidate in candidates):
                return entry
        return None

    def match_own(self, address: str, is_own: Callable[[Address], bool], *, exact: bool = False) -> str | None:
        """Return the entry ``loopback``, if there is one and `address` belongs to this machine as `is_own` says.

        From this machine, a connection to any of its addresses is as good as one to the loopback address: it passes no
        firewall. Networks such as 127.0.0.0/8 mean only what they say. `exact` and errors are as for `match`.
        """
        entry = next((entry for entry, _ in self.entries if entry.lower() == "loopback"), None)
        if entry is None:
            return None
        parsed = _parse_address(address.partition("%")[0])
        candidates = (parsed,) if exact else _effective_addresses(parsed)
        return entry if any(is_own(candidate) for candidate in candidates) else None

    def __contains__(self, address: str) -> bool:
        return self.match(address) is not None


@frozen
class HostPattern:
    """A host name pattern: `example.com` matches only that name, `*.example.com` all names below it, `.example.com`
    both."""

    entry: str
    name: str
    matches_apex: bool
    matches_subdomains: bool

    @classmethod
    def parse(cls, entry: str) -> HostPattern:
        """Parse a pattern. Raise `NameInvalid` if the rest of `entry` is not a host name."""
        wildcard = entry.startswith("*.")
        name = entry.removeprefix("*" if wildcard else "").removeprefix(".")
        host = Host.parse(name)
        if host.is_address or ":" in name:
            raise NameInvalid(f"{entry[:300]!r} is not a host name")
        return cls(entry, host.name, matches_apex=not wildcard, matches_subdomains=name != entry)

    def matches(self, name: str) -> bool:
        """Return whether the pattern matches `name` (lower-case)."""
        return (self.matches_apex and name == self.name) or (self.matches_subdomains and name.endswith("." + self.name))


@frozen
class Destinations:
    """A list of addresses and host name patterns, which an access rule allows or denies."""

    addresses: AddressSet = AddressSet()
    names: tuple[HostPattern, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Destinations:
        """Parse a list of addresses, networks, keywords and host name patterns, separated by spaces.

        Raise `ValueError` with one sentence about the first invalid entry.
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

    def match_name(self, name: str, *, exact: bool = False) -> str | None:
        """Return the entry that matches the host `name` (lower-case, as `Host.name`), or None.

        The words ``loopback`` and ``metadata`` also match the well-known names of these addresses, because an upstream
        proxy may resolve the name in our place. Allow lists pass `exact`, which turns that off.
        """
        for pattern in self.names:
            if pattern.matches(name):
                return pattern.entry
        if not exact:
            for entry, _ in self.addresses.entries:
                if any(pattern.matches(name) for pattern in _KEYWORD_NAMES.get(entry.lower(), ())):
                    return entry
        return next((entry for entry, _ in self.addresses.entries if entry.lower() == "all"), None)

    def match_address(self, address: str, *, exact: bool = False) -> str | None:
        """Return the entry that contains `address`, or None; see `AddressSet.match`."""
        return self.addresses.match(address, exact=exact)

    def match_own(self, address: str, is_own: Callable[[Address], bool], *, exact: bool = False) -> str | None:
        """Return the entry ``loopback`` if `address` belongs to this machine; see `AddressSet.match_own`."""
        return self.addresses.match_own(address, is_own, exact=exact)

    @property
    def names_only(self) -> bool:
        """Whether no entry can match an address, so that the host name alone decides."""
        return not any(networks for _, networks in self.addresses.entries)


_KEYWORD_NAMES = {
    # RFC 6761, section 6.3, and the names in the hosts file of most distributions.
    "loopback": _parse_names(".localhost", ".localhost.localdomain", "ip6-localhost", "ip6-loopback"),
    # Google, AWS, Azure, Tencent, Equinix and IBM; short names for search domains.
    "metadata": _parse_names(
        "metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal",
        "metadata.azure.internal", "metadata.tencentyun.com", "metadata.platformequinix.com",
        "api.metadata.cloud.ibm.com",
    ),
}  # fmt: skip


def _parse_entry(entry: str, syntax: str) -> tuple[Network, ...]:
    networks = _KEYWORDS.get(entry.lower())
    if networks is not None:
        return networks
    try:
        network = ip_network(entry, strict=False)
    except ValueError:
        raise ValueError(f"{redacted_repr(entry)} is not {syntax}") from None
    if "/" in entry and network.network_address != ip_address(entry.partition("/")[0]):
        raise ValueError(f"{redacted_repr(entry)} has host bits set; did you mean {network}?")
    if isinstance(network, IPv6Network) and network.subnet_of(_IPV4_MAPPED):
        mapped = IPv4Address(int(network.network_address) & 0xFFFFFFFF)
        return (IPv4Network((mapped, network.prefixlen - 96)),)
    return (network,)


@lru_cache(1024)  # because clients come back, and `ipaddress` takes 10 µs to parse an address
def _parse_address(address: str) -> Address:
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return parsed if mapped is None else mapped


def _effective_addresses(address: Address) -> Iterator[Address]:
    yield address
    if isinstance(address, IPv6Address):
        for embedded in _embedded_addresses(address):
            yield from _effective_addresses(embedded)
        if address.is_unspecified:
            yield IPv6Address("::1")
    elif address.is_unspecified:
        yield IPv4Address("127.0.0.1")


def _embedded_addresses(address: IPv6Address) -> Iterator[IPv4Address]:
    if address.sixtofour is not None:
        yield address.sixtofour
    elif address in _NAT64:
        yield IPv4Address(address.packed[12:])
    elif address in _LOCAL_NAT64:
        for positions in _NAT64_BYTES:
            embedded = IPv4Address(bytes(address.packed[position] for position in positions))
            if embedded not in _THIS_NETWORK:  # zeros, because the prefix is longer than these positions assume
                yield embedded
