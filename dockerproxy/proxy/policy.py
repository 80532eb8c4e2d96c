"""The access policy: which clients may use the proxy, and which destinations it may connect to. Pure."""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from dockerproxy.errors import Denied, DestinationForbidden
from dockerproxy.net.addresses import Address, AddressSet, Destinations
from dockerproxy.oci.names import Host, Registry

_HTTP_PORT = 80
_FIRST_UNPRIVILEGED_PORT = 1024


class OwnAddressDenied(Denied):
    """TUNNEL_DENY forbids the connection because `address` belongs to this machine."""

    def __init__(self, message: str, address: str) -> None:
        super().__init__(message)
        self.address = address


@frozen
class Policy:
    """The access rules, from the settings of the same names.

    Each check raises `Denied` if the rules forbid it. The message is one sentence that names the setting and the entry
    that forbids it. It never contains an address that a name resolved to. `is_own_address` returns whether an address
    belongs to this machine: the word ``loopback`` includes these.
    """

    allow_clients: AddressSet
    tunnel_ports: frozenset[int]
    tunnel_allow: Destinations
    tunnel_deny: Destinations
    is_own_address: Callable[[Address], bool]

    def check_client(self, address: str) -> None:
        """Check that a client at `address` may use the proxy."""
        try:
            allowed = self.allow_clients.match(address, exact=True) is not None
        except ValueError:  # a peer without an IP address, such as a UNIX socket
            allowed = False
        if not allowed:
            raise Denied(f"ALLOW_CLIENTS has no entry for your address, {address}.")

    def check_port(self, host: Host) -> None:
        """Check that a tunnel may go to the port of `host`."""
        if host.port not in self.tunnel_ports:
            raise Denied(f"TUNNEL_PORTS has no entry for port {host.port}.")

    def check_http_port(self, host: Host) -> None:
        """Check that a plain-HTTP request may be forwarded to the port of `host`.

        Unlike for a tunnel, all ports from 1024 are allowed, because the client cannot speak another protocol such as
        SMTP: we write the request ourselves.
        """
        if host.port != _HTTP_PORT and host.port < _FIRST_UNPRIVILEGED_PORT:
            self.check_port(host)

    def allows_client_to(self, server: Registry) -> bool:
        """Return whether a client may use `server` through this proxy, as far as its name and port decide."""
        try:
            if server.scheme == "https":
                self.check_port(server.host)
            else:
                self.check_http_port(server.host)
            self.check_name(server.host)
        except Denied:
            return False
        return True

    def check_name(self, host: Host) -> None:
        """Check `host` before its name is resolved. Refuse it if no address could make it allowed."""
        if host.is_address:
            return self.check_address(host, host.name)
        self._check_denied(host, self.tunnel_deny.match_name(host.name))
        if self.tunnel_allow.names_only and self.tunnel_allow.match_name(host.name, exact=True) is None:
            raise _not_allowed_error(host)

    def check_address(self, host: Host, address: str) -> None:
        """Check that a connection to `host` may use `address`, which its name resolved to.

        It may if TUNNEL_ALLOW has the name or the address, and TUNNEL_DENY has neither. If an upstream proxy resolves
        the name, `address` is the name, and only names count. Raise `OwnAddressDenied` if `address` is forbidden only
        because it belongs to this machine.
        """
        allow, deny = self.tunnel_allow, self.tunnel_deny
        self._check_denied(host, deny.match_name(host.name))
        allow_entry = allow.match_name(host.name, exact=True)
        if host.is_address or address != host.name:
            try:
                self._check_denied(host, deny.match_address(address))
                own_entry = deny.match_own(address, self.is_own_address)
                if own_entry is not None:
                    raise OwnAddressDenied(_denial(own_entry, host), address)
                allow_entry = (
                    allow_entry
                    or allow.match_address(address, exact=True)
                    or allow.match_own(address, self.is_own_address, exact=True)
                )
            except ValueError:  # not an IP address, so no rule can allow it
                allow_entry = None
        if allow_entry is None:
            raise _not_allowed_error(host)

    def check_covered(self, host: Host, address: str) -> None:
        """Check that we may connect to `address` for `host`, which is a registry only by a wildcard of REGISTRIES.

        A client chose the name, and anybody may own it, so TUNNEL_DENY applies to both. TUNNEL_ALLOW does not, as for
        all registries. If an upstream proxy resolves the name, `address` is the name.
        """
        self._check_denied(host, self.tunnel_deny.match_name(host.name))
        if address != host.name:
            self.check_upstream(address)

    def check_upstream(self, address: str) -> None:
        """Check that we may connect to `address`, which an upstream named in a redirect or as its token server.

        TUNNEL_DENY applies here too. TUNNEL_ALLOW does not, because it limits the destinations of clients, and content
        delivery networks may have any address. If an upstream proxy resolves the name, `address` is the name.
        """
        try:
            entry = self.tunnel_deny.match_address(address) or self.tunnel_deny.match_own(address, self.is_own_address)
        except ValueError:
            entry = self.tunnel_deny.match_name(address)
        if entry is not None:
            raise DestinationForbidden(f"TUNNEL_DENY ({entry}) forbids the address that the upstream refers to")

    @staticmethod
    def _check_denied(host: Host, entry: str | None) -> None:
        if entry is not None:
            raise Denied(_denial(entry, host))


def _denial(entry: str, host: Host) -> str:
    return f"TUNNEL_DENY ({entry}) forbids connections to {host.authority}."


def _not_allowed_error(host: Host) -> Denied:
    return Denied(f"TUNNEL_ALLOW has no entry for {host.authority}.")
