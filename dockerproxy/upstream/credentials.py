"""Credentials for requests to upstreams, and the rules about which hosts may receive the logins of AUTH_REGISTRIES."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry


@frozen
class Anonymous:
    """No login: the request carries no Authorization."""


@frozen
class ClientCredential:
    """The Authorization field of the client, forwarded unchanged."""

    authorization: str = field(repr=False)


Credential = Anonymous | BasicCredentials | ClientCredential


class LoginTable:
    """The logins of AUTH_REGISTRIES by host, and the rules about which host may receive which login.

    A registry chooses its realm, so the realm cannot be trusted. A login is sent only to the host that it is configured
    for. For a request to a registry it is sent to the host of the realm only if the two belong together: they share a
    domain, or the administrator configured the same login for both. Otherwise any registry could name
    ``auth.docker.io`` as its realm and receive the token that our login there obtains.
    """

    def __init__(self, logins: Mapping[Host, BasicCredentials]) -> None:
        self._by_host = logins

    def effective_login(self, registry: Registry, realm: Host | None) -> BasicCredentials | None:
        """Return the login for requests to `registry`, if `realm` is the host of its token server."""
        login = self._by_host.get(registry.host)
        return self._realm_login(realm, registry) if login is None and realm is not None else login

    def login_for(self, credential: Credential, host: Host, registry: Registry) -> BasicCredentials | None:
        """Return the login to send to `host` for a request to `registry` with `credential`, or None."""
        if not isinstance(credential, BasicCredentials):
            return None
        if credential not in self._by_host.values():
            return credential if host == registry.host else None
        return self._realm_login(host, registry)

    def _realm_login(self, realm: Host, registry: Registry) -> BasicCredentials | None:
        login = self._by_host.get(realm)
        if in_same_domain(realm.name, registry.host.name) or self._by_host.get(registry.host) == login:
            return login
        return None


def in_same_domain(one: str, other: str) -> bool:
    """Return whether two host names are equal, one is below the other, or both are below the same domain.

    The domain must have two labels or more.
    """
    if one == other:
        return True
    parent, other_parent = one.partition(".")[2], other.partition(".")[2]
    if parent.replace(".", "").isdigit() or ":" in one:  # because addresses have no domain
        return False
    is_subdomain = ("." in other and one.endswith(f".{other}")) or ("." in one and other.endswith(f".{one}"))
    return is_subdomain or ("." in parent and parent == other_parent)
