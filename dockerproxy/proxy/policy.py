"""Who may use the proxy, and where it goes for them. Pure: one question each, a refusal names the setting."""

from __future__ import annotations

from attrs import frozen

from dockerproxy.errors import Denied, DestinationForbidden
from dockerproxy.net.addresses import AddressSet, Destinations
from dockerproxy.oci.names import Host

_HTTP_PORT = 80
_FIRST_UNPRIVILEGED_PORT = 1024


@frozen
class Policy:
    """The access rules of the settings of the same names.

    Every check returns where the rules allow it and raises `Denied` otherwise, with one sentence that names the
    setting, and the entry that forbids, but no address that a name resolved to.
    """

    allow_clients: AddressSet
    tunnel_ports: frozenset[int]
    tunnel_allow: Destinations
    tunnel_deny: Destinations

    def check_client(self, address: str) -> None:
        """Check that a client at `address` may use the proxy."""
        try:
            allowed = self.allow_clients.match(address, exact=True) is not None
        except ValueError:  # a peer without an IP address, such as a UNIX socket's
            allowed = False
        if not allowed:
            raise Denied(f"ALLOW_CLIENTS has no entry for your address, {address}.")

    def check_port(self, host: Host) -> None:
        """Check that a tunnel may go to the port of `host`."""
        if host.port not in self.tunnel_ports:
            raise Denied(f"TUNNEL_PORTS has no entry for port {host.port}.")

    def check_http_port(self, host: Host) -> None:
        """Check that a plain-HTTP request may be forwarded to the port of `host`.

        Ports from 1024 are free here, other than for a tunnel: a request that we write ourselves cannot speak SMTP.
        """
        if host.port != _HTTP_PORT and host.port < _FIRST_UNPRIVILEGED_PORT:
            self.check_port(host)

    def check_name(self, host: Host) -> None:
        """Check `host` before its name is resolved: what no address could make allowed is refused here."""
        if host.is_address:
            return self.check_address(host, host.name)
        self._check_denied(host, self.tunnel_deny.match_name(host.name))
        if self.tunnel_allow.names_only and self.tunnel_allow.match_name(host.name) is None:
            raise _not_allowed_error(host)

    def check_address(self, host: Host, address: str) -> None:
        """Check that a connection made for `host` may go to `address`, one that its name resolved to.

        It may where TUNNEL_ALLOW has the name or the address, and TUNNEL_DENY has neither.
        """
        try:
            deny_entry = self.tunnel_deny.match_name(host.name) or self.tunnel_deny.match_address(address)
            allow_entry = self.tunnel_allow.match_name(host.name) or self.tunnel_allow.match_address(
                address, exact=True
            )
        except ValueError:  # no IP address: nothing that the rules could allow
            deny_entry = allow_entry = None
        self._check_denied(host, deny_entry)
        if allow_entry is None:
            raise _not_allowed_error(host)

    def check_upstream(self, address: str) -> None:
        """Check that we may connect to `address`, which an upstream led us to: by a redirect, or as a token server.

        TUNNEL_DENY holds here too. TUNNEL_ALLOW does not: it is about where clients may go, and content delivery
        networks are everywhere.
        """
        entry = self.tunnel_deny.match_address(address)
        if entry is not None:
            raise DestinationForbidden(f"TUNNEL_DENY ({entry}) forbids the address that upstream leads to")

    @staticmethod
    def _check_denied(host: Host, entry: str | None) -> None:
        if entry is not None:
            raise Denied(f"TUNNEL_DENY ({entry}) forbids connections to {host.authority}.")


def _not_allowed_error(host: Host) -> Denied:
    return Denied(f"TUNNEL_ALLOW has no entry for {host.authority}.")
