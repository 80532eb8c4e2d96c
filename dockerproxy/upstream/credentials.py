"""Credentials for requests to upstreams, and the rules about which hosts may receive the logins of AUTH_REGISTRIES."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import field, frozen
from twisted.logger import Logger

from dockerproxy.bounded_dict import BoundedDict
from dockerproxy.net.public_suffix import LIST_FILE, registrable_domain
from dockerproxy.oci.credentials import BasicCredentials, IdentityToken, Login
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_ALIASES, DOCKER_HUB_TOKENS
from dockerproxy.oci.host_table import HostKey, HostTable, RegistryWildcard, Wildcard
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


Credential = Anonymous | Login | ClientCredential


class LoginTable:
    """The logins of AUTH_REGISTRIES by host, and the rules about which host may receive which login.

    A registry chooses its realm, so the realm cannot be trusted. A login is sent only to the host that it is configured
    for. For a request to a registry it is sent to the host of the realm only if the two belong together: by their names
    (see `belong_together`), or because the administrator configured the same login for both. Otherwise any registry
    could name ``auth.docker.io`` as its realm and receive the token that our login there obtains.

    A login for a registry is also that of its realm if it is known to have this one (see `_KNOWN_REALMS`). A login for
    another name of Docker Hub is one for Docker Hub.
    """

    def __init__(self, logins: Mapping[HostKey, Login] | Mapping[Host, Login]) -> None:
        with_hub = _with_hub_login(logins)
        self._by_host = HostTable(with_hub)
        self._logins = frozenset(with_hub.values())
        self._unused: BoundedDict[tuple[Host, Host], bool] = BoundedDict(_MAX_WARNINGS)

    def effective_login(self, registry: Registry, realm: Host | None) -> Login | None:
        """Return the login for requests to `registry`, if `realm` is the host of its token server."""
        login = self._by_host.get(registry.host)
        return self._realm_login(realm, registry) if login is None and realm is not None else login

    def login_for(self, credential: Credential, host: Host, registry: Registry) -> Login | None:
        """Return the login to send to `host` for a request to `registry` with `credential`, or None."""
        if not isinstance(credential, BasicCredentials | IdentityToken):
            return None
        if credential not in self._logins:
            # It is one of before a change, and of the registry itself only if that has one of its own.
            return credential if host == registry.host and host in self._by_host else None
        return self._realm_login(host, registry)

    def _realm_login(self, realm: Host, registry: Registry) -> Login | None:
        login, registry_login = self._by_host.get(realm), self._by_host.get(registry.host)
        if login is None:
            if registry_login is None or _is_known_realm(realm, registry):
                return registry_login
            self._warn_once(
                "{registry} names {realm} as its token server, so the login for {registry} in AUTH_REGISTRIES is not"
                " used. If the two have one owner, add the login for the token server: {realm}:USER:PASSWORD",
                registry, realm,
            )  # fmt: skip
            return None
        if registry_login == login or belong_together(realm.name, registry.host.name):
            return login
        self._warn_once(
            "{registry} names {realm} as its token server, but the login for {realm} in AUTH_REGISTRIES is not"
            " used for it, because nothing shows that the two have one owner. If they do, add the same login for"
            " the registry: {registry}:USER:PASSWORD",
            registry, realm,
        )  # fmt: skip
        return None

    def _warn_once(self, message: str, registry: Registry, realm: Host) -> None:
        if (realm, registry.host) not in self._unused:
            self._unused[realm, registry.host] = True
            log.warn(message, registry=str(registry), realm=str(realm))


_HUB_HOSTS = tuple(registry.host for registry in (DOCKER_HUB_TOKENS, DOCKER_HUB, *DOCKER_HUB_ALIASES))
"""The hosts of Docker Hub. The login for the first one that has a login is used."""


def _with_hub_login(logins: Mapping[HostKey, Login] | Mapping[Host, Login]) -> Mapping[HostKey, Login]:
    """Return `logins` with one for Docker Hub itself if there is one for another of its names."""
    by_key: dict[HostKey, Login] = dict(logins.items())
    hub_login = next((by_key[host] for host in _HUB_HOSTS if host in by_key), None)
    if hub_login is not None and DOCKER_HUB_TOKENS.host not in by_key:
        by_key[DOCKER_HUB.host] = hub_login
    return by_key


def login_warnings(
    logins: Mapping[HostKey, BasicCredentials],
    registries: Iterable[Registry],
    wildcards: Iterable[RegistryWildcard] = (),
) -> list[str]:
    """Return sentences about logins of AUTH_REGISTRIES that are never used.

    `registries` and `wildcards` are those that are served.

    A host is named only if another setting names it, or if it is the first. Any other may be the rest of a password
    that contains the delimiter of logins.
    """
    registries, served = tuple(registries), [wildcard.hosts for wildcard in wildcards]
    used, *ignored = [host for host in _HUB_HOSTS if host in logins] or [DOCKER_HUB.host]
    warnings = [
        f"AUTH_REGISTRIES has different logins for {used} and {host}, which are both Docker Hub. The login for {used} "
        "is used; remove the other."
        for host in ignored
        if logins[host] != logins[used]
    ]
    table = HostTable(logins)
    shared_logins = [table[registry.host] for registry in registries if registry.host in table]
    for position, (host, login) in enumerate(logins.items(), 1):
        is_covered = (Wildcard.above(host) if isinstance(host, Host) else host) in served
        label = f"entry {position} ({host})" if position == 1 else f"entry {position}"
        if is_covered or host in _HUB_HOSTS or login in shared_logins:
            continue
        at_other_ports = [one.host for one in registries if one.host.name == host.name and one.host not in table]
        if isinstance(host, Host) and at_other_ports:
            warnings.append(
                f"AUTH_REGISTRIES: {label} is for another port than the registry {at_other_ports[0]}. Write "
                f"{at_other_ports[0]}:USER:PASSWORD, unless only its token server is at that port."
            )
        elif not any(belong_together(host.name, registry.host.name) for registry in registries):
            warnings.append(
                f"AUTH_REGISTRIES: {label} is never used, because its host is neither Docker Hub, nor in REGISTRIES, "
                "nor the token server of a registry that is (unless one of them redirects to it). Add the registry to "
                "REGISTRIES, or write the host of one that is served: "
                f"{', '.join(map(str, [*registries, *served]))}."
            )
    return warnings


def _is_known_realm(realm: Host, registry: Registry) -> bool:
    return realm.port == registry.host.port == 443 and _KNOWN_REALMS.get(registry.host.name) == realm.name


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
