"""The addresses that members of a fleet may have. PURE.

Members connect to each other from the address that FLEET has, and know each other by it. So it is the address of one
machine, and all are of one family. A loopback address is another machine for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, ip_address

from dockerproxy.oci.names import Host


class AddressesInvalid(ValueError):
    """Addresses that cannot be those of one fleet. The message is a sentence without its end."""


def plain(member: Host) -> Host:
    """Return `member`, with an IPv4 address in the form of IPv6 as such: connections come from that."""
    mapped = getattr(ip_address(member.name), "ipv4_mapped", None) if member.is_address else None
    return member if mapped is None else Host(str(mapped), member.port)


def split_families(members: Iterable[Host]) -> tuple[list[Host], list[Host]]:
    """Return the members with IPv4 addresses, and those with IPv6 addresses."""
    families: tuple[list[Host], list[Host]] = [], []
    for member in members:
        families[":" in member.name].append(member)
    return families


def check_addresses(members: Sequence[Host]) -> None:
    """Raise `AddressesInvalid` if `members`, which are addresses, cannot be those of one fleet."""
    for member in members:
        kind = _kind(member)
        if kind:
            raise AddressesInvalid(f"FLEET has {member.name}, {kind}, in place of the address of a machine")
    ipv4, ipv6 = split_families(members)
    if ipv4 and ipv6:
        raise AddressesInvalid(
            f"FLEET has addresses of IPv4 and IPv6 ({ipv4[0].authority} and {ipv6[0].authority}); members know each"
            " other by the address that they connect from, so use those of one of the two"
        )
    loopback = [member for member in members if ip_address(member.name).is_loopback]
    if loopback and len(loopback) < len(members):
        raise AddressesInvalid(
            f"FLEET has {loopback[0].name}, by which each machine means itself, beside the addresses of others"
        )


def _kind(member: Host) -> str:
    address = ip_address(member.name)
    if address.is_unspecified:
        return "which stands for all addresses"
    if address.is_multicast or str(address) == "255.255.255.255":
        return "the address of a group"
    if isinstance(address, IPv6Address) and address.is_link_local:
        return "a link-local address"
    return ""
