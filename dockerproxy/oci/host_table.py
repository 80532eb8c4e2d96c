"""Tables by host with wildcards: ``*.pkg.dev`` stands for the hosts with exactly one more label, as in a certificate.

RFC 9525, section 6.3, has the rule. One certificate therefore serves all of them, so that nothing has to be created for
a host that a client makes up. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from attrs import frozen

from dockerproxy.errors import NameInvalid
from dockerproxy.oci.names import Host, Registry

V = TypeVar("V")

_PREFIX = "*."


@frozen(slots=True)
class Wildcard:
    """All hosts whose name is one label and `suffix`, at one port."""

    suffix: str
    port: int = 443

    @classmethod
    def parse(cls, text: str, default_port: int = 443) -> Wildcard:
        """Return the wildcard in ``*.example.com`` or ``*.example.com:5000``, or raise `NameInvalid`."""
        host = Host.parse(text.removeprefix(_PREFIX), default_port)
        if not text.startswith(_PREFIX) or host.is_address:
            raise NameInvalid(f"{text[:300]!r} is not a wildcard such as *.example.com")
        return cls(host.name, host.port)

    @classmethod
    def above(cls, host: Host) -> Wildcard:
        """Return the only wildcard that can cover `host`."""
        return cls(host.name.partition(".")[2], host.port)

    @property
    def name(self) -> str:
        """The name as in a certificate."""
        return _PREFIX + self.suffix

    def __str__(self) -> str:
        return _PREFIX + str(Host(self.suffix, self.port))


HostKey = Host | Wildcard


def parse_host_key(text: str, default_port: int = 443) -> HostKey:
    """Return the host or the wildcard in `text`, or raise `NameInvalid`."""
    return Wildcard.parse(text, default_port) if text.startswith("*") else Host.parse(text, default_port)


class HostTable(Mapping[Host, V]):
    """Values by host. An entry for a host itself wins over a wildcard; iteration yields only hosts with such a one."""

    def __init__(self, entries: Mapping[HostKey, V] | Mapping[Host, V]) -> None:
        self._by_host = {key: value for key, value in entries.items() if isinstance(key, Host)}
        self._by_wildcard = {key: value for key, value in entries.items() if isinstance(key, Wildcard)}

    def __getitem__(self, host: Host) -> V:
        value = self._by_host.get(host)
        if value is not None or not self._by_wildcard:
            return self._by_host[host]
        return self._by_wildcard[Wildcard.above(host)]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._by_host)

    def __len__(self) -> int:
        return len(self._by_host)

    def entries(self) -> Iterator[tuple[HostKey, V]]:
        """Yield all entries, those of wildcards as well."""
        yield from self._by_host.items()
        yield from self._by_wildcard.items()


@frozen
class RegistryWildcard:
    """Registries below one domain, all with the same `scheme`."""

    hosts: Wildcard
    scheme: str = "https"

    @classmethod
    def parse(cls, text: str) -> RegistryWildcard:
        """Return the registries in ``*.example.com[:port]``, with ``http://`` before it if they have no TLS.

        Raise `NameInvalid`.
        """
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(Wildcard.parse(text))
        if scheme not in ("http", "https"):
            raise NameInvalid(f"{text[:300]!r} has a scheme other than http or https")
        return cls(Wildcard.parse(rest, 80 if scheme == "http" else 443), scheme)

    def __str__(self) -> str:
        return str(self.hosts)


class RegistryMap(Mapping[Host, Registry]):
    """Registries by host. A look-up also finds those that a wildcard covers; iteration yields only the listed ones."""

    def __init__(self) -> None:
        self._listed: dict[Host, Registry] = {}
        self._wildcards: dict[Wildcard, str] = {}
        self._excluded: frozenset[str] = frozenset()

    def replace(
        self,
        registries: Iterable[tuple[Host, Registry]],
        wildcards: Iterable[RegistryWildcard],
        excluded: Iterable[str] = (),
    ) -> None:
        """Replace all entries. No wildcard covers the names in `excluded`."""
        self._listed.clear()
        self._listed.update(registries)
        self._wildcards = {wildcard.hosts: wildcard.scheme for wildcard in wildcards}
        self._excluded = frozenset(excluded)

    def covering(self, host: Host) -> Wildcard | None:
        """Return the wildcard by which `host` is here; None if it is listed itself, or not here."""
        wildcard = Wildcard.above(host)
        if wildcard not in self._wildcards or host in self._listed or host.name in self._excluded:
            return None
        return wildcard

    def __getitem__(self, host: Host) -> Registry:
        registry = self._listed.get(host)
        if registry is not None:
            return registry
        wildcard = self.covering(host) if self._wildcards else None
        if wildcard is None:
            raise KeyError(host)
        return Registry(host, self._wildcards[wildcard])

    def __iter__(self) -> Iterator[Host]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)
