"""Which addresses belong to this machine, as the kernel routes them."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from dockerproxy.errors import DestinationForbidden

# linux/netlink.h and linux/rtnetlink.h
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence number, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, bits of the destination, ..., type at index 7, flags
_ATTRIBUTE = struct.Struct("=HH")  # rtattr: length, type
_NLMSG_ERROR, _RTM_NEWROUTE, _RTM_GETROUTE = 2, 24, 26
_NLM_F_REQUEST, _RTA_DST = 1, 1
_RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST, _RTN_MULTICAST = 2, 3, 4, 5
_OWN_TYPES = (_RTN_LOCAL, _RTN_BROADCAST, _RTN_ANYCAST, _RTN_MULTICAST)


def is_own_address(address: IPv4Address | IPv6Address) -> bool:
    """Return whether a connection to `address` would reach this machine itself, or a group that it may belong to.

    The kernel's route decides: the addresses of all interfaces, and whatever else is routed to this machine. (A socket
    can be bound to foreign addresses too, if `ip_nonlocal_bind` is set, so that says less.) The answer comes at once
    and takes about 20 µs. Raise `DestinationForbidden` if the kernel cannot be asked.
    """
    family = socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address.packed), _RTA_DST) + address.packed
    route = _ROUTE.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    size = _HEADER.size + len(route) + len(attribute)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
            kernel.sendto(_HEADER.pack(size, _RTM_GETROUTE, _NLM_F_REQUEST, 1, 0) + route + attribute, (0, 0))
            answer = kernel.recv(4096, socket.MSG_DONTWAIT)
    except OSError as error:
        raise DestinationForbidden(
            f"cannot ask the kernel whether {address} is an address of this machine: {os.strerror(error.errno or 0)}; "
            "does a sandbox forbid AF_NETLINK?"
        ) from None
    _, message_type, *_ = _HEADER.unpack_from(answer)
    if message_type != _RTM_NEWROUTE:  # an error: there is no route, so a connection would fail too
        return False
    route_type: int = _ROUTE.unpack_from(answer, _HEADER.size)[7]
    return route_type in _OWN_TYPES
