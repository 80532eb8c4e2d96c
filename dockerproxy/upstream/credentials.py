"""Credentials for requests to upstreams, and the rules about which hosts may receive the logins of AUTH_REGISTRIES."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import field, frozen
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.net.public_suffix import LIST_FILE, registrable_domain
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.names import Host, Registry

_MAX_WARNINGS = 256

log = Logger()


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
    for. For a request to a registry it is sent to the host of the realm only if the two belong together: by their names
    (see `belong_together`), or because the administrator configured the same login for both. Otherwise any registry
    could name ``auth.docker.io`` as its realm and receive the token that our login there obtains.
    """

    def __init__(self, logins: Mapping[Host, BasicCredentials]) -> None:
        self._by_host = logins
        self._unused: BoundedDict[tuple[Host, Host], bool] = BoundedDict(_MAX_WARNINGS)

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
        if login is None:
            return None
        if self._by_host.get(registry.host) == login or belong_together(realm.name, registry.host.name):
            return login
        if (realm, registry.host) not in self._unused:
            self._unused[realm, registry.host] = True
            log.warn(
                "{registry} names {realm} as its token server, but the login for {realm} in AUTH_REGISTRIES is not"
                " used for it, because nothing shows that the two have one owner. If they do, add the same login for"
                " the registry: {registry}:USER:PASSWORD",
                registry=str(registry), realm=str(realm),
            )  # fmt: skip
        return None


# Realms of public registries on a host of another name. Most registries issue tokens on their own.
_KNOWN_REALMS = {
    "docker.elastic.co": "docker-auth.elastic.co",
    "registry-1.docker.io": "auth.docker.io",
    "registry.digitalocean.com": "api.digitalocean.com",
    "registry.gitlab.com": "gitlab.com",
}


def belong_together(realm: str, registry: str, suffix_list: Path = LIST_FILE) -> bool:
    """Return whether the token server at the host name `realm` has the owner of the one at `registry`.

    That is so if the names are equal, if the realm is below the registry's own name, if the pair is a known one, or if
    both are below one registered domain (`gitlab.company.com` and `registry.company.com`). A domain of which everybody
    can have a part, such as `duckdns.org`, is no such domain. Without the `suffix_list`, no domain is known to be one.
    """
    if realm == registry or _KNOWN_REALMS.get(registry) == realm:
        return True
    if _is_address(realm) or _is_address(registry):  # addresses have no domain
        return False
    if "." in registry and realm.endswith(f".{registry}"):
        return True
    domain = registrable_domain(registry, suffix_list)
    return domain is not None and domain == registrable_domain(realm, suffix_list)


def _is_address(name: str) -> bool:
    return ":" in name or name.rpartition(".")[2].isdigit()
