"""The hosts of Docker Hub, which is one registry with several names."""

from __future__ import annotations

from functools import lru_cache

from dockerproxy.oci.host_table import HostKey
from dockerproxy.oci.names import Registry

DOCKER_HUB = Registry.parse("registry-1.docker.io")
DOCKER_HUB_TOKENS = Registry.parse("auth.docker.io")

DOCKER_HUB_ALIASES = tuple(map(Registry.parse, ("index.docker.io", "docker.io", "registry.hub.docker.com")))
"""Its other names. crane, kaniko, cosign and others pull from index.docker.io; containerd's `?ns=` is docker.io.

Their `/v2/` is the registry. Other paths of each are its own, such as the search at index.docker.io/v1/search.
"""


def canonical_registry(server: Registry) -> Registry:
    """Return the registry at `server`: Docker Hub for one of its other names, else `server` itself."""
    return _CANONICAL.get(server, server)


@lru_cache(1024)  # a hit asks for it, and a wildcard has any number of hosts
def registry_label(server: Registry) -> str:
    """Return the name of a registry as people write it: ``docker.io`` for Docker Hub, its aliases and its tokens."""
    return "docker.io" if canonical_registry(server) in _HUB_SERVERS else str(server)


_HUB_SERVERS = frozenset({DOCKER_HUB, DOCKER_HUB_TOKENS})


def shown_name(key: str) -> str:
    """Return the name of a cached repository as people write it: ``docker.io/library/nginx``.

    `key` is its name in the cache's store, which begins with the host of its registry.
    """
    host, slash, rest = key.partition("/")
    return f"docker.io/{rest}" if slash and host == _HUB_HOST else key


def short_name(shown: str) -> str:
    """Return the name that docker shows, without the host of Docker Hub: ``nginx`` for ``docker.io/library/nginx``.

    `shown` is a `shown_name`.
    """
    rest = shown.removeprefix("docker.io/")
    return shown if rest == shown else rest.removeprefix("library/")


def stored_name(name: str) -> str | None:
    """Return the name of the cached repository, ``HOST/NAME``, that `name` means to docker; None if that has no name.

    A name without a host is one of Docker Hub. A repository there is in ``library/`` if its name has no slash.
    """
    host, _, rest = name.partition("/") if names_host(name) else (str(DOCKER_HUB), "/", name)
    if not rest:
        return None
    if host.lower() not in _HUB_NAMES:
        return name
    return f"{DOCKER_HUB}/{rest}" if "/" in rest else f"{DOCKER_HUB}/library/{rest}"


def names_host(name: str) -> bool:
    """Return whether `name` begins with a host, as docker reads it: with a dot, a colon, or ``localhost``."""
    first, slash, _ = name.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


def canonical_host(key: HostKey) -> HostKey:
    """Return the host that a login is for: the registry's for all hosts of Docker Hub, else `key` itself."""
    return DOCKER_HUB.host if key in _HUB_HOSTS else key


_HUB_HOSTS = frozenset(registry.host for registry in (DOCKER_HUB, DOCKER_HUB_TOKENS, *DOCKER_HUB_ALIASES))

_HUB_HOST = str(DOCKER_HUB.host)
_HUB_NAMES = frozenset(str(registry) for registry in (DOCKER_HUB, *DOCKER_HUB_ALIASES))

_CANONICAL = dict.fromkeys(DOCKER_HUB_ALIASES, DOCKER_HUB)
