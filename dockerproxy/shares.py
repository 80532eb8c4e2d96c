"""A bound for a finite thing that clients use, and a share of it for one client. Pure.

Without a share, one client can take all there is: connections, uploads, threads. Everything that clients can use up is
counted by a `ClientShares`, and `dockerproxy debug` shows all of them.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Protocol, TypedDict

from attrs import define, field

from dockerproxy.errors import RegistryError, ServiceOverloaded, TooManyRequests

_IPV6_CLIENT_PREFIX = 64  # bits; a host has as many addresses of its network as it likes (RFC 4862)
_MAX_REPORTED = 5  # clients in a report


class BoundReport(TypedDict):
    """The state of a bound, as a JSON value. `clients` are those that hold most."""

    name: str
    used: int
    limit: int
    share: int
    refused: int
    clients: dict[str, int]


class Bound(Protocol):
    """A bound that `dockerproxy debug` shows."""

    def report(self) -> BoundReport: ...


def client_key(address: str) -> str:
    """Return the text that a client with this address is counted by: its network for IPv6, else the address itself."""
    if ":" not in address:
        return address
    try:
        ip = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(ip) >> _IPV6_CLIENT_PREFIX << _IPV6_CLIENT_PREFIX, _IPV6_CLIENT_PREFIX)))


@define(eq=False)
class ClientShares:
    """Counts the things called `name` (a plural for sentences, such as "open uploads") that clients hold.

    All clients together may hold `limit`, and one client `share`. The names of the settings of both are in the refusal.
    A client is an address, or another text that stands for one. `""` is the daemon itself: it has no share, and may
    also use `reserved` of the limit, which clients may not. A refused client may try again after `retry_after` seconds.
    """

    name: str
    limit: int
    share: int
    limit_setting: str = field(default="", kw_only=True)
    share_setting: str = field(default="", kw_only=True)
    reserved: int = field(default=0, kw_only=True)
    retry_after: int = field(default=1, kw_only=True)
    used: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)
    _held: Counter[str] = field(factory=Counter, init=False)

    def acquire(self, client: str, amount: int = 1) -> None:
        """Count `amount` more for `client`. Raise `TooManyRequests` or `ServiceOverloaded`; then count nothing."""
        if not self.has_room(client, amount):
            raise self.refuse(client, amount)
        self.add(client, amount)

    def add(self, client: str, amount: int = 1) -> None:
        """Count `amount` more for `client`, even beyond its share and the limit."""
        self.used += amount
        self._held[client_key(client)] += amount

    def release(self, client: str, amount: int = 1) -> None:
        """Count `amount` less for `client`, which acquired it."""
        client = client_key(client)
        self.used -= amount
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]

    def has_room(self, client: str, amount: int = 1) -> bool:
        """Return whether `client` may acquire `amount` more."""
        if not client:
            return self.used + amount <= self.limit
        return self.used + amount <= self.limit - self.reserved and self.held_by(client) + amount <= self.share

    def refuse(self, client: str, amount: int = 1) -> RegistryError:
        """Count a refusal, and return the error that says why `client` may not acquire `amount` more."""
        self.refused += 1
        headers = [("Retry-After", str(self.retry_after))]
        held = self.held_by(client)
        if client and held + amount > self.share:
            return TooManyRequests(
                f"{client_key(client)} has {held} of the {self.share} {self.name} that one client may have"
                f"{_in_parentheses(self.share_setting)}",
                headers=headers,
            )
        return ServiceOverloaded(
            f"all clients together have {self.used} of the {self.limit - self.reserved} {self.name} that they may have"
            f"{_in_parentheses(self.limit_setting)}",
            headers=headers,
        )

    def held_by(self, client: str) -> int:
        """Return how much `client` holds."""
        return self._held[client_key(client)]  # a Counter does not store a missing key

    @property
    def clients(self) -> int:
        """The number of clients that hold something."""
        return len(self._held)

    @property
    def holders(self) -> list[str]:
        """The clients that hold something."""
        return list(self._held)

    def top_clients(self, count: int = _MAX_REPORTED) -> list[tuple[str, int]]:
        """Return the clients that hold most, and how much each holds."""
        return self._held.most_common(count)

    def report(self) -> BoundReport:
        """Return the state for `dockerproxy debug`."""
        return BoundReport(
            name=self.name,
            used=self.used,
            limit=self.limit,
            share=self.share,
            refused=self.refused,
            clients=dict(self.top_clients()),
        )


def _in_parentheses(setting: str) -> str:
    return f" ({setting})" if setting else ""
