"""Who a request upstream is made as, and to whom our logins may be shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from attrs import field, frozen

from dockerproxy.oci.challenge import basic_authorization
from dockerproxy.oci.names import Host, Registry


@frozen
class Anonymous:
    """No login: the request carries no Authorization."""


@frozen
class BasicCredentials:
    """A login for one registry, most often one of AUTH_REGISTRIES."""

    user: str = field(repr=False)
    password: str = field(repr=False)

    @property
    def authorization(self) -> str:
        """The Basic value of an Authorization field."""
        return basic_authorization(self.user, self.password)


@frozen
class ClientCredential:
    """What the client itself sent as Authorization, passed on as it is."""

    authorization: str = field(repr=False)


Credential = Anonymous | BasicCredentials | ClientCredential


class Login(Protocol):
    """An entry of AUTH_REGISTRIES."""

    @property
    def user(self) -> str: ...

    @property
    def password(self) -> str: ...


class LoginTable:
    """The logins of AUTH_REGISTRIES by host, with the rule about who may be shown which.

    A realm is named by the registry, so it is the registry's word against our secret. A login goes to the host that
    it is for and nowhere else. And on behalf of a registry it goes to the host of its realm only where the two belong
    together, by their names or because the administrator gave both the same login: else any registry could name
    ``auth.docker.io`` as its realm and be handed the token that our login there is worth.
    """

    def __init__(self, logins: Mapping[Host, Login]) -> None:
        self._by_host = {host: BasicCredentials(login.user, login.password) for host, login in logins.items()}

    def effective_login(self, registry: Registry, realm: Host | None) -> BasicCredentials | None:
        """Return the login that requests to `registry`, whose tokens `realm` gives out, are made with."""
        login = self._by_host.get(registry.host)
        return self._realm_login(realm, registry) if login is None and realm is not None else login

    def login_for(self, credential: Credential, host: Host, registry: Registry) -> BasicCredentials | None:
        """Return the login to show to `host` in a request for `registry` made as `credential`, or None."""
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
    """Whether two host names are the same, one below the other, or below the same domain of two labels or more."""
    if one == other:
        return True
    parent, other_parent = one.partition(".")[2], other.partition(".")[2]
    if parent.replace(".", "").isdigit() or ":" in one:  # addresses are not below anything
        return False
    is_subdomain = ("." in other and one.endswith(f".{other}")) or ("." in one and other.endswith(f".{one}"))
    return is_subdomain or ("." in parent and parent == other_parent)
